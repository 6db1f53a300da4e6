"""What the Hub says of a card's metadata, as far as a local check can tell."""

from __future__ import annotations

from typing import Any

import yaml

_NAMES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl
ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0
odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3
llama4 grok2-community gemma unknown other
"""
LICENSES = frozenset(_NAMES.split())
RELATIONS = ("adapter", "merge", "quantized", "finetune")


def problems(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of a README.md."""
    lines = content.replace("\r\n", "\n").split("\n")
    if lines[0] != "---" or "---" not in lines[1:]:
        return [], ["empty or missing yaml metadata in repo card"]
    text = "\n".join(lines[1 : 1 + lines[1:].index("---")])
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [f"YAML metadata cannot be read: {error}"], []
    if not isinstance(data, dict):
        return ["YAML metadata must be a mapping"], []
    return _errors(data), []


def _errors(data: dict[str, Any]) -> list[str]:
    found = [
        f'"license" must be one of the known licenses, not {name!r}'
        for name in _listed(data.get("license"))
        if name not in LICENSES
    ]
    found += [
        f'"{key}" must be a string or a list of strings'
        for key in ("base_model", "tags", "datasets", "language")
        if not all(isinstance(value, str) for value in _listed(data.get(key)))
    ]
    relation = data.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        found.append(f'"base_model_relation" must be one of {", ".join(RELATIONS)}')
    index = data.get("model-index")
    if index is not None and not (isinstance(index, list) and all("name" in i for i in index)):
        found.append('"model-index" must be a list of entries with a name')
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
