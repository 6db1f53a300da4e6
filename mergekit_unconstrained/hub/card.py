"""The model card: README.md out of facts and a template (model_cards/merge.md.j2)."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mergekit_unconstrained.catalog import entry_for
from mergekit_unconstrained.engine.files import replacing
from mergekit_unconstrained.errors import UnconstrainedError
from mergekit_unconstrained.hub import markdown
from mergekit_unconstrained.hub.facts import (
    THIS_MODEL,
    CardFacts,
    DataSet,
    Method,
    Parent,
    Score,
    Source,
    WeightFile,
    from_json,
    is_hub_id,
    listed,
    to_json,
    unknowns,
)
from mergekit_unconstrained.hub.findings import finding, reading, worse
from mergekit_unconstrained.hub.licence_rules import RULES
from mergekit_unconstrained.hub.licences import NOT_LEGAL_ADVICE, Verdict
from mergekit_unconstrained.hub.names import display_name, sanitise_paths
from mergekit_unconstrained.resources import resource

__all__ = [
    "CardFacts",
    "DataSet",
    "Method",
    "Parent",
    "Score",
    "Source",
    "WeightFile",
    "display_name",
    "from_json",
    "render",
    "sanitise_paths",
    "to_json",
    "write",
]

TEMPLATE = "model_cards/merge.md.j2"
TERMS_TEMPLATE = "model_cards/licence.md.j2"
TERMS = "LICENSE.md"
CITED = ("2410.13699", "2403.13257")
"""arXiv numbers that the template cites by itself."""
PACKAGED = {Path(name).name: name for name in (TEMPLATE, TERMS_TEMPLATE)}
"""What a template may include or extend."""
_FILE_NAME = re.compile(r"\w[\w.-]*")


def render(facts: CardFacts, template: Path | None = None) -> str:
    """The card's text. template: a Jinja file instead of ours; it runs in a sandbox."""
    known = {
        "facts": facts,
        "front_matter": front_matter(facts),
        "verdict": facts.verdict,
        "finding": finding(facts),
        "reading": reading(facts),
        "worse": worse(facts),
        "unknowns": unknowns(facts),
        "told_method": told_method(facts),
        "varies": varies(facts),
        "own_paper": own_paper(facts.method),
        "disclaimer": NOT_LEGAL_ADVICE,
        "rules": RULES,
    }
    # However many optional parts are missing, paragraphs are one empty line apart.
    return _outside_code(_filled(template or resource(TEMPLATE), known)).strip() + "\n"


def varies(facts: CardFacts) -> str:
    """By what the weights differ: `layer`, `kind of tensor`, both, or nothing at all."""
    words = {word for p in facts.experts for word in p.weight.partition(", by ")[2].split(" and ")}
    shown = [("layer", "layer"), ("kind", "kind of tensor")]
    return " and ".join(name for word, name in shown if word in words)


def own_paper(method: Method) -> tuple[str, str] | None:
    """Title and arXiv number of a method's paper, from the catalogue; None for the card's own."""
    entry = entry_for(method.name)
    found = re.fullmatch(r"(.+) \(arXiv (\d+\.\d+)\)", entry.paper) if entry else None
    return None if found is None or found[2] in CITED else (found[1], found[2])


def told_method(facts: CardFacts) -> str:
    """What the method did in this model; the catalogue's words where it has no choices."""
    if facts.fusion is not None:
        names = [teacher.name for teacher in facts.fusion.teachers]
        say = "says" if len(names) == 1 else "say"
        return (
            f"what {listed(names)} {say} of the next token, position by position, is the target "
            f"towards which {facts.fusion.pivot} was fine-tuned on {facts.fusion.dataset}"
        )
    if facts.method.operator is None or not any(p.weight for p in facts.experts):
        return facts.method.summary
    thinned = re.search(r"\bdensity\b", f"{facts.recipe}\n{facts.coefficients or ''}")
    numbers = "weights and densities" if thinned else "weights"
    what = f"{varies(facts)} of every expert" if varies(facts) else "expert"
    return f"the experts' task vectors, combined with {numbers} chosen for every {what}"


def terms(facts: CardFacts) -> str | None:
    """The text of LICENSE.md, where no single licence says all; else None."""
    if facts.verdict.effective != "other" or not _is_known(facts.verdict):
        return None
    known = {"facts": facts, "verdict": facts.verdict, "disclaimer": NOT_LEGAL_ADVICE}
    known["rules"] = RULES
    return _outside_code(_filled(resource(TERMS_TEMPLATE), known)).strip() + "\n"


def write(folder: Path, facts: CardFacts, template: Path | None = None) -> None:
    """Write README.md, and LICENSE.md where the terms are several parents'.

    The heat map that the facts name is drawn by the caller beforehand.
    """
    texts = {"README.md": render(facts, template), TERMS: terms(facts)}
    for name, text in texts.items():
        if text is not None:
            with replacing(folder / name) as stream:
                stream.write(text.encode("utf-8"))


def front_matter(facts: CardFacts) -> str:
    """The card's metadata for the Hub, as YAML."""
    data: dict[str, Any] = _licence_data(facts.verdict)
    models = [s.hub_id for p in facts.merged for s in p.sources if is_hub_id(s.hub_id)]
    if models:
        # A fusion fine-tunes its pivot; its teachers are no base models in the Hub's sense.
        tuned = facts.fusion is not None and len(set(models)) == 1
        relation = "finetune" if tuned else "merge"
        data |= {"base_model": list(dict.fromkeys(models)), "base_model_relation": relation}
    datasets = [d.hub_id for d in facts.data if is_hub_id(d.hub_id)]
    if datasets:
        data["datasets"] = list(dict.fromkeys(datasets))
    languages = [one for one in facts.languages if re.fullmatch(r"[a-z]{2,3}|multilingual", one)]
    if languages:
        data["language"] = languages
    method = markdown.one_line(facts.method.name)
    data |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(["merge", "mergekit", "mergekit-unconstrained", method])),
    }
    if results := _model_index(facts):
        data["model-index"] = [{"name": markdown.one_line(facts.title), "results": results}]
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=math.inf).strip()


def _licence_data(found: Verdict) -> dict[str, Any]:
    """The Hub knows a closed list of short names."""
    if found.effective != "other":
        return {"license": found.effective}
    if not _is_known(found):
        return {"license": "unknown"}
    return {"license": "other", "license_name": found.name, "license_link": TERMS}


def _is_known(found: Verdict) -> bool:
    """Whether anything at all can be said of the terms."""
    return found.name != "unknown"


def _model_index(facts: CardFacts) -> list[dict[str, Any]]:
    """This model's own scores, as the Hub reads results."""
    found = []
    for s in facts.evaluation:
        if s.model != THIS_MODEL or not math.isfinite(s.value):
            continue
        name, metric = markdown.one_line(s.task) or "task", markdown.one_line(s.metric) or "score"
        said = [metric, *([f"n = {s.n}"] if s.n is not None else [])]
        said += [f"standard error {s.stderr:.2g}"] if s.stderr is not None else []
        score = {"type": _slug(metric), "name": ", ".join(said), "value": float(f"{s.value:.6g}")}
        found.append(
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": name, "type": _slug(name)},
                "metrics": [score],
            }
        )
    return found


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "unnamed"


def _filled(path: Path, known: Mapping[str, Any]) -> str:
    try:
        return _compiled(path.read_text(encoding="utf-8")).render(known)
    except jinja2.TemplateNotFound as error:  # an OSError as well
        raise UnconstrainedError(
            f"card template {path}: it includes or extends {error.name!r}, and only "
            f"{listed(list(PACKAGED))} can be: put everything else into the template itself"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UnconstrainedError(f"card template {path} cannot be read: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        raise UnconstrainedError(f"card template {path}:{error.lineno}: {error.message}") from None
    except jinja2.UndefinedError as error:
        said = str(error.message).replace(f"{CardFacts.__module__}.", "")
        raise UnconstrainedError(
            f"card template {path}: {said}. A template knows {', '.join(sorted(known))}; facts has "
            f"{', '.join(field.name for field in dataclasses.fields(CardFacts))}"
        ) from None
    except jinja2.TemplateError as error:
        raise UnconstrainedError(f"card template {path}: {error.message}") from None
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise UnconstrainedError(f"card template {path}: {type(error).__name__}: {error}") from None


@functools.lru_cache(maxsize=4)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _packaged(name: str) -> str | None:
    """The text of one of our own templates, None for every other name: no file of the user's."""
    return packaged_template(name) if name in PACKAGED else None


def packaged_template(name: str = "merge.md.j2") -> str:
    """The text of a template that comes with this package."""
    return resource(PACKAGED[name]).read_text(encoding="utf-8")


@functools.cache
def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        loader=jinja2.FunctionLoader(_packaged),
        autoescape=False,  # this is Markdown: the filters below know how
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "md": markdown.md,
        "line": markdown.one_line,
        "code": markdown.code,
        "fence": markdown.fence,
        "link": markdown.link,
        "table": markdown.without_empty_columns,
        "public": sanitise_paths,
        "python": json.dumps,
        "lower_first": _lower_first,
        "licences": _licences,
        "fingerprint": _fingerprint,
        "beginning": _beginning,
        "counted": _counted,
        "hardware": _hardware,
        "listed": listed,
        "lines": lambda text: len(text.splitlines()),
        "short": _short,
        "size": _size,
        "duration": _duration,
    }
    environment.tests |= {"hub_id": is_hub_id, "file_name": _is_file_name}
    return environment


def _outside_code(text: str) -> str:
    """Squeeze runs of empty lines, except inside fenced code."""
    lines: list[str] = []
    fence = ""
    for line in text.splitlines():
        ticks = re.match(r"`{3,}", line)
        if not fence and not line.strip() and lines and not lines[-1].strip():
            continue
        lines.append(line if fence else line.rstrip())
        if ticks and not fence:
            fence = ticks[0]
        elif fence and line == fence:
            fence = ""
    return "\n".join(lines)


def _is_file_name(text: object) -> bool:
    return isinstance(text, str) and _FILE_NAME.fullmatch(text) is not None


def _lower_first(text: str) -> str:
    """`Layer-wise merging` within a sentence; `TIES` stays."""
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _licences(parent: Parent) -> str:
    """The licence of a parent, and of its adapter where that is another."""
    model, *adapter = (source.licence or "unknown" for source in parent.sources)
    return ", adapter ".join([model, *(licence for licence in adapter if licence != model)])


def _fingerprint(parent: Parent) -> str:
    """The beginning of the hash of a parent's own weights, where they are one file."""
    files = parent.sources[-1].files
    if len(files) == 1:
        return _beginning(files[0].sha256)
    return f"{len(files)} files, see Checksums" if files else ""


def _beginning(digest: str | None) -> str:
    return f"{digest[:12]}…" if digest else ""


def _counted(counts: Mapping[str, int]) -> str:
    """`40 search, 20 test`; the number alone where nothing else is said."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _hardware(machine: Mapping[str, str]) -> str:
    """Accelerators, processor, cores and memory in one phrase."""
    parts = [machine.get(key, "") for key in ("accelerators", "processor", "memory", "system")]
    if cores := machine.get("cores"):
        parts.insert(2, f"{cores} cores")
    return ", ".join(part for part in parts if part)


def _short(number: int | None) -> str:
    """134515008 -> `134.5 M`; empty for None."""
    if number is None:
        return ""
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return str(number)


def _size(files: Sequence[WeightFile]) -> str:
    total = sum(f.size or 0 for f in files)
    what = "1 file" if len(files) == 1 else f"{len(files)} files"
    if not total:
        return what
    unit, name = next(
        (u, n) for u, n in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "B")) if total >= u
    )
    return f"{what}, {total / unit:.3g} {name}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 0.1):.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
