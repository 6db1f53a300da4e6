"""What can be known of a parent model before a weight is read: its config and tensor headers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_unconstrained.compat import ModelReference
from mergekit_unconstrained.config.first_look import looks_local, missing
from mergekit_unconstrained.errors import ModelError


@dataclass(frozen=True)
class TensorHeader:
    """Shape and safetensors dtype name ("BF16") of one stored tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Parent:
    """One model of a recipe.

    tensors: headers by stored name, None for pickles that are still on the Hub. folder: where it
    lies locally, None when it is still on the Hub. commit: the resolved commit of a Hub model that
    is in the local cache.
    """

    reference: ModelReference
    config: Any
    tensors: Mapping[str, TensorHeader] | None
    folder: Path | None
    weight_files: tuple[Path, ...] = ()
    adapter_files: tuple[Path, ...] = ()
    commit: str | None = None

    @property
    def name(self) -> str:
        """The model as the recipe writes it."""
        return str(self.reference)


def read_parent(reference: ModelReference, *, trust_remote_code: bool = False) -> Parent:
    """Config and headers of a model; of an adapter's base when the reference carries an adapter."""
    plain = ModelReference(
        model=reference.model, override_architecture=reference.override_architecture
    )
    try:
        config = plain.config(trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _unreadable(plain, error) from error
    folder = _local_folder(plain)
    adapter = _adapter_files(reference)
    if folder is None:
        return Parent(reference, config, _hub_headers(plain), None, adapter_files=adapter)
    files = tuple(weight_files(folder))
    if not files:
        raise ModelError(
            f"{plain} has no weights: there is no *.safetensors or *.bin in its folder"
        )
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        read = read_header if file.suffix == ".safetensors" else read_pickle
        tensors.update(read(file, str(plain)))
    return Parent(reference, config, tensors, folder, files, adapter, _commit(folder))


def weight_files(folder: Path) -> Iterator[Path]:
    """The files mergekit will read from a folder, in its order of preference."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.exists():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{index.name} of {folder.name} is damaged: {error}") from None
            for shard in shards:
                if not (folder / shard).exists():
                    raise ModelError(
                        f"{folder.name} is incomplete: {shard} is named in {index.name} but missing"
                    )
                yield folder / shard
            return
        if (folder / stem).exists():
            yield folder / stem
            return


def read_header(file: Path, model: str) -> dict[str, TensorHeader]:
    """The header of a safetensors file; ModelError when it is damaged or cut short."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((int(t["data_offsets"][1]) for t in header.values()), default=0)
        tensors = {n: TensorHeader(tuple(t["shape"]), t["dtype"]) for n, t in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{file.name} of {model} is not a safetensors file: {error}; fetch it again"
        ) from None
    if 8 + length + end != size:
        missing = 8 + length + end - size
        what = f"is cut short by {missing:,} bytes" if missing > 0 else "has bytes too many"
        raise ModelError(f"{file.name} of {model} {what}; fetch it again")
    return tensors


def read_pickle(file: Path, model: str) -> dict[str, TensorHeader]:
    """Names and shapes of a .bin file, by torch's restricted unpickler; no weight is read."""
    import torch

    try:
        state = torch.load(file, map_location="meta", weights_only=True)
        state = state.get("state_dict", state)
        tensors = {n: t for n, t in state.items() if isinstance(t, torch.Tensor)}
    except Exception as error:
        raise ModelError(
            f"{file.name} of {model} cannot be read without running code from it "
            f"({type(error).__name__}): fetch it again, or convert it to safetensors"
        ) from error
    return {
        name: TensorHeader(tuple(tensor.shape), _SAFETENSORS.get(str(tensor.dtype), "F32"))
        for name, tensor in tensors.items()
    }


_SAFETENSORS = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
}
"""safetensors' name of a dtype."""


def _local_folder(reference: ModelReference) -> Path | None:
    path = Path(reference.model.path)
    if path.is_dir():
        return path
    cached = cached_folder(reference.model.path, "config.json", reference.model.revision)
    try:
        # Reading its config alone makes a folder in the cache, without the weights.
        return cached if cached is not None and any(weight_files(cached)) else None
    except ModelError:  # not all of it yet
        return None


def cached_folder(
    repository: str, file: str, revision: str | None = None, cache: str | None = None
) -> Path | None:
    """The folder in the Hub's cache that holds a file of a repository; None without it.

    mergekit fetches a part of a repository, which `snapshot_download(local_files_only=True)` takes
    for incomplete. cache: where it is not the usual one.
    """
    import huggingface_hub

    try:
        found = huggingface_hub.try_to_load_from_cache(
            repository, file, cache_dir=cache, revision=revision
        )
    except Exception:  # no id of the Hub at all
        return None
    return Path(found).parent if isinstance(found, str) else None


def _commit(folder: Path) -> str | None:
    return folder.name if folder.parent.name == "snapshots" else None


def _hub_headers(reference: ModelReference) -> dict[str, TensorHeader] | None:
    import huggingface_hub

    try:
        metadata = huggingface_hub.get_safetensors_metadata(
            reference.model.path, revision=reference.model.revision
        )
    except huggingface_hub.errors.NotASafetensorsRepoError:
        return None
    except Exception as error:
        raise _unreadable(reference, error) from error
    return {
        name: TensorHeader(tuple(info.shape), info.dtype)
        for file in metadata.files_metadata.values()
        for name, info in file.tensors.items()
    }


def _adapter_files(reference: ModelReference) -> tuple[Path, ...]:
    """The weights of a local adapter; ModelError when its folder is not one."""
    if reference.lora is None:
        return ()
    path = Path(reference.lora.path)
    if not path.is_dir():
        if looks_local(reference.lora.path):
            raise ModelError(missing("adapter", str(reference.lora)))
        return ()
    if not (path / "adapter_config.json").exists():
        raise ModelError(f"{reference.lora} is not a PEFT adapter: it has no adapter_config.json")
    files = tuple(sorted(path.glob("adapter_model.*")))
    if not files:
        raise ModelError(f"the adapter {reference.lora} has no weights (adapter_model.safetensors)")
    for file in files:
        if file.suffix == ".safetensors":
            read_header(file, str(reference.lora))
    return files


def _unreadable(reference: ModelReference, error: Exception) -> ModelError:
    path = Path(reference.model.path)
    if path.is_dir():
        if not (path / "config.json").exists():
            return ModelError(f"{reference} is not a model folder: it has no config.json")
        return ModelError(f"the config.json of {reference} cannot be read: {_first_line(error)}")
    if looks_local(reference.model.path):
        return ModelError(missing("model", str(reference)))
    return ModelError(
        f"{reference} is neither a folder here nor a readable model on the Hub (mistyped? private "
        f"or gated without a token? offline?): {_first_line(error)}"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
