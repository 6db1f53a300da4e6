"""The folder in which a fusion keeps what its stages made: a second run makes only the rest.

    WORK/data-1f0c22aa/               a stage is a folder whose name ends with its inputs' hash
    WORK/distributions/gpt2-8e11d0b3/
    WORK/train/gpt2-77aa01c9/manifest.json

A stage whose inputs changed (other data, models, tokenizers, settings) is another folder: nothing
is overwritten, and going back to the old settings finds the old results.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_unconstrained import __version__
from mergekit_unconstrained.engine import staging
from mergekit_unconstrained.engine.files import replacing
from mergekit_unconstrained.errors import OutputError

MANIFEST = "manifest.json"
LOCK = ".lock"
LOG = logging.getLogger(__name__)
FOLLOWING = frozenset({"data", "distributions", "feed", "parts", "pivot"})
"""Inputs that are an earlier stage's key, and change with it."""
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate")


@dataclass(frozen=True)
class Stage:
    """One stage's folder. name: `distributions/gpt2`; key: the hash of inputs; seed: of the run."""

    folder: Path
    name: str
    key: str
    inputs: Mapping[str, Any]

    @property
    def manifest(self) -> dict[str, Any] | None:
        """What the folder says of itself, None before the stage has begun."""
        return read_manifest(self.folder)

    @property
    def finished(self) -> bool:
        """Whether the stage ended; an unfinished one is resumed inside."""
        manifest = self.manifest
        return manifest is not None and bool(manifest["finished"])

    @property
    def results(self) -> dict[str, Any]:
        """What the finished stage found out."""
        return dict((self.manifest or {}).get("results", {}))

    @contextmanager
    def running(self) -> Iterator[dict[str, Any]]:
        """Note the start, give a mapping for results, and note the end when the block did not fail.

        A disk that fills up becomes one OutputError that names the stage.
        """
        started = time.monotonic()
        results: dict[str, Any] = {}
        if (different := self._differences()) and not self.folder.exists():
            LOG.warning(
                "%s is made anew, since it was made with other %s; the earlier one stays",
                self.name,
                ", ".join(different),
            )
        before = float((self.manifest or {}).get("seconds", 0.0))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(finished=False, seconds=before, results={})
            yield results
            self._write(True, before + time.monotonic() - started, results)
        except BaseException as error:
            if not staging.disk_full(error) or isinstance(error, OutputError):
                raise
            raise OutputError(
                f"the disk is full in stage {self.name}: make room for {self.folder} and run the "
                "same command again; what is finished is kept"
            ) from error

    def _differences(self) -> list[str]:
        """Inputs unlike those of the earlier stage that is nearest, but for other stages' keys."""
        earlier = [
            manifest
            for folder in self.folder.parent.glob(f"{self.folder.name[:-11]}-*")
            if (manifest := read_manifest(folder)) is not None and manifest["stage"] == self.name
        ]
        if not earlier or any(m["key"] == self.key for m in earlier):
            return []
        now = json.loads(json.dumps(self.inputs, default=str))
        names = [
            sorted(k for k in now.keys() | m["inputs"].keys() if now.get(k) != m["inputs"].get(k))
            for m in earlier
        ]
        return [name for name in min(names, key=len) if name not in FOLLOWING]

    def discard(self) -> None:
        """Remove what an earlier run of this stage left."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, finished: bool, seconds: float, results: Mapping[str, Any]) -> None:
        content = {
            "stage": self.name,
            "key": self.key,
            "finished": finished,
            "seconds": round(seconds, 2),
            "inputs": self.inputs,
            "results": results,
            "versions": _versions(),
        }
        with replacing(self.folder / MANIFEST) as stream:
            stream.write(json.dumps(content, indent=2, default=str).encode())


@dataclass(frozen=True)
class WorkDir:
    """The stages of one fusion. root: may not exist yet."""

    root: Path

    def stage(self, name: str, inputs: Mapping[str, Any]) -> Stage:
        """The folder of a stage for these inputs (JSON-like; what its results depend on)."""
        key = hashed({"version": __version__, **inputs})
        place = self.root.joinpath(*(safe(part) for part in name.split("/")))
        return Stage(place.with_name(f"{place.name}-{key[:10]}"), name, key, inputs)

    def stages(self) -> list[tuple[Path, dict[str, Any]]]:
        """Every stage that was begun, in the order of their start, with its manifest."""
        found = []
        for file in self.root.rglob(MANIFEST):
            manifest = read_manifest(file.parent)
            if manifest is not None:
                found.append((file.parent, manifest))
        return sorted(found, key=lambda pair: pair[0].stat().st_ctime)

    @contextmanager
    def locked(self, resume: bool = True) -> Iterator[None]:
        """Keep a second run out while the block runs. resume False: refuse what is not empty."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write to {self.root}: {error.strerror}") from error
        if not resume and any(p.name != LOCK for p in self.root.iterdir()):
            raise OutputError(
                f"{self.root} holds results of an earlier run and the settings say `resume: false`:"
                " remove it, or choose another work_dir"
            )
        with (self.root / LOCK).open("w", encoding="utf-8") as note:
            staging.lock(note, self.root)
            yield


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, None when there is none; OutputError when it cannot be read."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(manifest["finished"], bool) or not isinstance(manifest["inputs"], dict):
            raise ValueError("not a manifest of a stage")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{file} cannot be read ({error}): remove {folder}, and the stage is made anew"
        ) from None
    return dict(manifest)


def hashed(inputs: Mapping[str, Any]) -> str:
    """sha256 of JSON-like inputs, independent of the order of their keys."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def safe(name: str) -> str:
    """A model's or stage's name as a file name: nothing of it can leave the folder."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-")[:60] or "model"


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"mergekit-unconstrained": __version__} | versions
