"""A model folder, Hub id, or either with an adapter, as a Subject: safetensors only, no code."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mergekit_unconstrained.engine.digest import sha256
from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.evaluation.subject import Subject

DTYPES = ("auto", "float32", "bfloat16", "float16")
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
"""What a model's scores depend on: weights, configuration, tokenizer."""


def load(name: str, *, dtype: str = "auto", device: str = "auto", batch_size: int = 16) -> Subject:
    """As Subject.load."""
    where = _device(device)
    precision = _dtype(dtype, where)
    model_name, adapter_name = _parts(name)
    folder = _folder(model_name, "config.json", "model")
    adapter = _folder(adapter_name, "adapter_config.json", "adapter") if adapter_name else None
    model = _model(folder, model_name, precision)
    if adapter is not None:
        model = _with_adapter(model, adapter, name)
    tokenizer = _tokenizer(folder, model_name)
    rows = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer of {model_name} has {len(tokenizer)} tokens, but the model embeds "
            f"{rows} only: the tokenizer of another model lies in its folder"
        )
    try:
        model = model.to(where).eval()
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{name} does not fit into the memory of {where}") from error
    folders = [folder] if adapter is None else [folder, adapter]
    weights = fingerprint(folders, str(precision).removeprefix("torch."))
    return Subject(name, model, tokenizer, weights, batch_size)


def check_there(name: str) -> None:
    """Look for a model, and its adapter, without loading it; what is on the Hub is fetched.

    ModelError when there is none, or a folder lacks its configuration or weights.
    """
    model, adapter = _parts(name)
    _folder(model, "config.json", "model")
    if adapter:
        _folder(adapter, "adapter_config.json", "adapter")


def fingerprint(folders: list[Path], dtype: str) -> str:
    """Hash of what the files of a model (and adapter) hold, and of the precision it runs in."""
    found = hashlib.sha256(dtype.encode())
    for folder in folders:
        files = sorted({file for pattern in _FILES for file in folder.glob(pattern)})
        for file in files:
            found.update(f"\n{file.name} {sha256(file)}".encode())
        found.update(b"\n+")
    return found.hexdigest()


def _parts(name: str) -> tuple[str, str]:
    """`model+adapter` taken apart; a folder may have a plus in its name."""
    if "+" not in name or Path(name).expanduser().is_dir():
        return name, ""
    model, _, adapter = name.partition("+")
    if not model or not adapter:
        raise ModelError(f"{name!r}: a model and its adapter are written MODEL+ADAPTER")
    return model, adapter


def _folder(name: str, config: str, what: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_dir():
        return _from_hub(name, what)
    if not (path / config).is_file():
        raise ModelError(f"{name} is no {what} folder: it has no {config}")
    if not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{name} has no weights as safetensors, and nothing else is read: convert them"
        )
    missing = [file for file in _listed(path) if not (path / file).is_file()]
    if missing:
        raise ModelError(f"{name} is incomplete: {missing[0]} of its index is not there")
    return path


def _listed(folder: Path) -> list[str]:
    """The files that an index of several names; what is wrong with an index, loading tells."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _from_hub(name: str, what: str) -> Path:
    import huggingface_hub

    plain, _, revision = name.partition("@")
    try:
        huggingface_hub.utils.validate_repo_id(plain)
        if plain.count("/") != 1 or plain.startswith((".", "~")):
            raise ValueError("not a name on the Hub")
    except ValueError:
        raise ModelError(
            f"there is no {what} folder {name!r} (paths are relative to the current directory)"
        ) from None
    try:
        return Path(
            huggingface_hub.snapshot_download(
                plain, revision=revision or None, allow_patterns=list(_FILES)
            )
        )
    except Exception as error:
        raise ModelError(
            f"{name!r} is neither a folder here nor a readable {what} on the Hub (mistyped? "
            f"private or gated without a token? offline?): {_first_line(error)}"
        ) from error


def _model(folder: Path, name: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with _without_bars():
            model, told = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:
        raise ModelError(f"the model {name} cannot be loaded: {_first_line(error)}") from error
    missing = sorted(told.get("missing_keys") or ())
    if missing:
        raise ModelError(
            f"{name} is incomplete: its files lack {len(missing)} weights, {missing[0]} among them"
        )
    return model


def _with_adapter(model: Any, adapter: Path, name: str) -> Any:
    from peft import PeftModel

    try:
        with _without_bars(), warnings.catch_warnings():
            # peft asks transformers in words that transformers has begun to replace
            warnings.simplefilter("ignore", FutureWarning)
            return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except Exception as error:
        raise ModelError(
            f"the adapter of {name} cannot be applied: {_first_line(error)}"
        ) from error


def _tokenizer(folder: Path, name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"the tokenizer of {name} cannot be loaded: {_first_line(error)}"
        ) from error


def _device(device: str) -> torch.device:
    if device == "auto":
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        return found or torch.device("cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except Exception as error:
        raise ModelError(
            f"there is no device {device!r} here ({_first_line(error)}): try auto or cpu"
        ) from error
    return found


def _dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype not in DTYPES:
        raise ModelError(f"no dtype is called {dtype!r}: choose one of {', '.join(DTYPES)}")
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    found: torch.dtype = getattr(torch, dtype)
    return found


@contextmanager
def _without_bars() -> Iterator[None]:
    """Loading draws bars of its own, across ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
