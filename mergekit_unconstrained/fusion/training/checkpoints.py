"""Checkpoints of a training run: which ones are whole, and which one to continue from.

transformers writes the files of checkpoint-N one after another under their final names, several
processes at a time: a kill leaves a folder that looks like a checkpoint. A whole one therefore gets
a list of its files and their sizes, written last and at once.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from mergekit_unconstrained.engine.files import replacing

LIST = "complete.json"


def mark_complete(checkpoint: Path) -> None:
    """Note that every file of a checkpoint is there."""
    sizes = {
        file.relative_to(checkpoint).as_posix(): file.stat().st_size
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name != LIST
    }
    with replacing(checkpoint / LIST) as stream:
        stream.write(json.dumps(sizes, indent=1).encode())


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that was noted is there in full."""
    try:
        sizes = json.loads((checkpoint / LIST).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def keep_complete(folder: Path) -> Path | None:
    """Remove half-written (or half-removed) checkpoints; give the latest whole one."""
    whole: list[tuple[int, Path]] = []
    for checkpoint in folder.glob("checkpoint-*"):
        step = checkpoint.name.removeprefix("checkpoint-")
        if step.isdigit() and is_complete(checkpoint):
            whole.append((int(step), checkpoint))
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)
    return max(whole)[1] if whole else None
