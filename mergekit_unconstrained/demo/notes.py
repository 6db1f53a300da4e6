"""What a step of the demo left, beside a hash of all it depends on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

Scores = dict[str, dict[str, float]]  # by task, then by figure


def digest(*parts: Path | str) -> str:
    """sha256 over texts, files, and all files below folders, by content and name."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            total.update(f"text {part}\n".encode())
            continue
        files = sorted(p for p in part.rglob("*") if p.is_file()) if part.is_dir() else [part]
        for file in files:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            total.update(f"file {file.name} {content}\n".encode())
    return total.hexdigest()


def recall(note: Path, inputs: str) -> Scores | None:
    """What a finished step left, if its inputs were these; None otherwise."""
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found: Scores | None = content["result"]
    return found if content["inputs"] == inputs else None


def remember(note: Path, inputs: str, result: Scores) -> None:
    """Note that a step is finished; a kill leaves the old note or the new one."""
    partial = note.with_suffix(".partial")
    partial.write_text(json.dumps({"inputs": inputs, "result": result}), encoding="utf-8")
    partial.replace(note)
