"""What can be said of the models that went in: where they are from, licence, hashes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergekit_unconstrained.config.parents import Parent, cached_folder, weight_files
from mergekit_unconstrained.config.table import short_name
from mergekit_unconstrained.engine.digest import BackgroundDigests, sha256
from mergekit_unconstrained.errors import UnconstrainedError
from mergekit_unconstrained.hub import facts
from mergekit_unconstrained.hub.names import cached_id, display_name
from mergekit_unconstrained.hub.pinning import adapter_commit, lies_here

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files that hold a vocabulary, the one that tells most first."""


def resolved(parents: Iterable[Parent], cache: str | None = None) -> list[Parent]:
    """Parents that were still on the Hub when the plan was made, as they lie in the cache now.

    cache: the Hub's cache folder, where it is not the usual one.
    """
    found = [_adapter_resolved(_model_resolved(p, cache), cache) for p in parents]
    for parent in found:
        fetch_card(parent.folder)
        fetch_card(next((file.parent for file in parent.adapter_files), None))
    return found


def _model_resolved(parent: Parent, cache: str | None) -> Parent:
    if parent.folder is not None:
        return parent
    model = parent.reference.model
    folder = cached_folder(model.path, "config.json", model.revision, cache)
    if folder is None:
        return parent
    try:
        files = tuple(weight_files(folder))
    except UnconstrainedError:  # a part of it is somewhere else
        files = ()
    return dataclasses.replace(parent, folder=folder, weight_files=files, commit=folder.name)


def fetch_card(folder: Path | None) -> None:
    """Bring the card of a model into its folder of the Hub's cache, where mergekit left it out.

    Without a card the licence is not known. Offline, or where there is none, nothing happens.
    """
    import huggingface_hub

    known = cached_id(str(folder)) if folder is not None else None
    if folder is None or known is None or (folder / "README.md").exists():
        return
    cache = folder.parent.parent.parent
    with contextlib.suppress(Exception):
        huggingface_hub.hf_hub_download(known[0], "README.md", revision=known[1], cache_dir=cache)


def _adapter_resolved(parent: Parent, cache: str | None) -> Parent:
    adapter = parent.reference.lora
    if adapter is None or parent.adapter_files:
        return parent
    folder = cached_folder(adapter.path, "adapter_config.json", adapter.revision, cache)
    files = tuple(sorted(folder.glob("adapter_model.*"))) if folder is not None else ()
    return dataclasses.replace(parent, adapter_files=files)


def source_of(
    parent: Parent, places: Mapping[str, str], digests: BackgroundDigests | None = None
) -> facts.Source:
    """A parent's model, without its adapter. places: of pinning.places."""
    model = parent.reference.model
    local = lies_here(model.path)
    card = declared(parent.folder)
    return facts.Source(
        name=_shown(str(model), model.path, local, places),
        hub_id=None if local else places[model.path],
        commit=None if local else parent.commit,
        files=tuple(file_facts(f, digests) for f in parent.weight_files),
        licence=card["licence"],
        revision=None if local else model.revision,
        languages=card["languages"],
        made_from=card["made_from"],
        tokenizer=tokenizer_hash(parent.folder),
        place=places[model.path] if local else None,
    )


def adapter_of(
    parent: Parent, places: Mapping[str, str], digests: BackgroundDigests | None = None
) -> facts.Source | None:
    """A parent's adapter, None when it has none."""
    adapter = parent.reference.lora
    if adapter is None:
        return None
    local = lies_here(adapter.path)
    card = declared(next((f.parent for f in parent.adapter_files), None))
    return facts.Source(
        name=_shown(str(adapter), adapter.path, local, places),
        hub_id=None if local else places[adapter.path],
        commit=None if local else adapter_commit(parent),
        files=tuple(file_facts(f, digests) for f in parent.adapter_files),
        licence=card["licence"],
        revision=None if local else adapter.revision,
        languages=card["languages"],
        made_from=card["made_from"],
        place=places[adapter.path] if local else None,
    )


def _shown(reference: str, path: str, local: bool, places: Mapping[str, str]) -> str:
    """The name in tables: the last part of a local path, all of it where that is not enough."""
    if not local:
        return display_name(reference)
    ends = [short_name(place) for place in places.values()]
    end = short_name(places[path])
    return end if ends.count(end) == 1 else places[path]


def parameters_of(parent: Parent) -> int | None:
    """The number of a parent's weights, None where its headers are not known."""
    return sum(math.prod(h.shape) for h in (parent.tensors or {}).values()) or None


def architecture_of(parent: Parent) -> str:
    """The class that transformers loads a parent with."""
    return str((getattr(parent.config, "architectures", None) or [""])[0])


def file_facts(file: Path, digests: BackgroundDigests | None = None) -> facts.WeightFile:
    """Name, hash and size of a file. digests: where its hash is already being computed."""
    digest = digests[file] if digests is not None and file in digests else sha256(file)
    return facts.WeightFile(name=file.name, sha256=digest, size=file.stat().st_size)


def tokenizer_hash(folder: Path | None) -> str | None:
    """sha256 of the file that holds a model's vocabulary."""
    files = (folder / name for name in TOKENIZERS) if folder is not None else ()
    found = next((file for file in files if file.is_file()), None)
    return sha256(found) if found is not None else None


def licence(folder: Path | None) -> str | None:
    """The licence that a model's own card declares."""
    found: str | None = declared(folder)["licence"]
    return found


def declared(folder: Path | None) -> dict[str, Any]:
    """What the card in a folder says of `licence`, `languages` and what it was `made_from`."""
    from huggingface_hub import ModelCard

    nothing: dict[str, Any] = {"licence": None, "languages": (), "made_from": ()}
    card = folder / "README.md" if folder is not None else None
    if card is None or not card.is_file():  # load() would take the path for a Hub id
        return nothing
    try:
        data = ModelCard.load(card).data
        named = data.license
        if named == "other" and data.get("license_name"):
            named = f"other: {data.get('license_name')}"
        lists = {"languages": data.get("language"), "made_from": data.get("base_model")}
        found = {key: [v] if isinstance(v, str) else list(v or ()) for key, v in lists.items()}
    except Exception:  # a card that cannot be read: not known
        return nothing
    texts = {key: tuple(v for v in values if isinstance(v, str)) for key, values in found.items()}
    return {"licence": str(named) if named else None, **texts}


def has_chat_template(folder: Path) -> bool:
    """Whether a model's folder brings a chat template."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(config.get("chat_template")) or (folder / "chat_template.jinja").exists()
