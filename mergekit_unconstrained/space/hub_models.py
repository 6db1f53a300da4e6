"""Models of the Hub, looked at without a weight: found by name, and kept as shadows.

A shadow is a folder with a model's config, its tokenizer, its licence, and safetensors files that
have the real headers and a hole where the weights would be (a sparse file: no disk). Whatever reads
a model before its weights, reads a shadow.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi

from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.space.confine import MAX_NAME, check_index, is_hub_id

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
SMALL = {
    "config.json": 2**20,
    INDEX: 16 * 2**20,
    "tokenizer.json": 48 * 2**20,
    "tokenizer_config.json": 4 * 2**20,
}
"""Files that are fetched, and how many bytes each may have."""
MAX_SHARDS = 300
MAX_SHARD = 2**40
FOUND = 15


def search(words: str, api: HfApi) -> list[str]:
    """Text generation models whose name has these words, the most downloaded first."""
    text = words.strip()[:MAX_NAME]
    if not text:
        return []
    try:
        found = api.list_models(
            search=text, pipeline_tag="text-generation", sort="downloads", limit=FOUND
        )
        return [m.id for m in found if is_hub_id(m.id) and len(m.id) <= MAX_NAME]
    except Exception as error:
        raise ModelError(f"the Hub cannot be searched: {_said(error)}") from error


def shadow(name: str, into: Path, api: HfApi) -> Path:
    """The shadow of a model of the Hub below `into`; fetched once for a commit.

    into: a folder for one person, since what their token may see is not for everybody. Raises
    ModelError when there is no such model, it has no safetensors, or it may not be seen.
    """
    repo, _, revision = name.partition("@")
    try:
        info = api.model_info(repo, revision=revision or None, files_metadata=True, timeout=20)
    except Exception as error:
        raise ModelError(f"{name} cannot be looked at on the Hub: {_said(error)}") from error
    owner, _, short = repo.partition("/")
    folder = into / f"models--{owner}--{short}" / "snapshots" / str(info.sha)
    if folder.is_dir():
        return folder
    sizes = {s.rfilename: s.size or 0 for s in info.siblings or ()}
    _check_sizes(name, sizes)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        _fill(made, name, repo, info, sizes, api)
        made.rename(folder)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{name} cannot be looked at on the Hub: {_said(error)}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _check_sizes(name: str, sizes: dict[str, int]) -> None:
    if "config.json" not in sizes:
        raise ModelError(f"{name} has no config.json: it is no transformers model")
    if WEIGHTS not in sizes and INDEX not in sizes:
        raise ModelError(
            f"{name} has no safetensors: pickles (*.bin) can run code when they are read and are "
            "not taken here"
        )
    for file, limit in SMALL.items():
        if sizes.get(file, 0) > limit:
            raise ModelError(f"{name}: {file} has {sizes[file]:,} bytes, {limit:,} are the limit")


def _fill(folder: Path, name: str, repo: str, info: Any, sizes: dict[str, int], api: HfApi) -> None:
    """Write the files of a shadow."""
    with tempfile.TemporaryDirectory() as cache:
        for file in SMALL:
            if file in sizes and (file != INDEX or WEIGHTS not in sizes):
                here = api.hf_hub_download(repo, file, revision=info.sha, cache_dir=cache)
                shutil.copyfile(here, folder / file)
    shards = [WEIGHTS]
    if WEIGHTS not in sizes:
        shards = check_index((folder / INDEX).read_bytes(), name)
    if len(shards) > MAX_SHARDS:
        raise ModelError(f"{name} has {len(shards)} files of weights, {MAX_SHARDS} are the limit")
    for shard in shards:
        found = api.parse_safetensors_file_metadata(repo, shard, revision=info.sha)
        header = {
            n: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": list(t.data_offsets)}
            for n, t in found.tensors.items()
        }
        write_hollow(folder / shard, header)
    card = info.card_data.to_dict() if info.card_data is not None else {}
    licence = {"license": str(card["license"])} if isinstance(card.get("license"), str) else {}
    text = f"---\n{yaml.safe_dump(licence)}---\n" if licence else ""
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_hollow(path: Path, header: dict[str, Any]) -> None:
    """A safetensors file with a header and nothing behind it but a hole of the right size."""
    text = json.dumps(header, separators=(",", ":")).encode()
    end = max((int(t["data_offsets"][1]) for t in header.values()), default=0)
    if not 0 <= end <= MAX_SHARD:
        raise ModelError(f"{path.name}: a file of {end:,} bytes is not believed")
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


def _said(error: Exception) -> str:
    """The last line of the Hub's own words is the one that says what is wrong."""
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"
