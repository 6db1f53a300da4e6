"""The demo's merges: concrete recipes, and the unchanged `mergekit-yaml` as a subprocess."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergekit_unconstrained.errors import UnconstrainedError
from mergekit_unconstrained.resources import resource

_PERCENT = re.compile(r"(\d+)%\|")


def concrete_recipe(shipped: Path, base: Path, out: Path) -> Path:
    """A shipped recipe with the paths of this machine, written to the folder `out`.

    The coefficient table, if there is one, is copied beside it.
    """
    recipe: dict[str, Any] = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    recipe["base_model"] = str(base)
    for entry in recipe["models"]:
        adapter = resource(entry["model"].partition("+")[2])
        entry["model"] = f"{base}+{adapter}"
    table = recipe.get("parameters", {}).get("coefficients")
    if table is not None:
        copied = out / Path(table).name
        shutil.copyfile(resource(table), copied)
        recipe["parameters"]["coefficients"] = str(copied)
    for path in (base, *(entry["model"].partition("+")[2] for entry in recipe["models"])):
        if "+" in str(path) or "@" in str(path):
            raise UnconstrainedError(
                f"mergekit reads + and @ in a path as adapter and revision, and {path} has one: "
                "set MERGEKIT_UNCONSTRAINED_CACHE or install elsewhere"
            )
    text = f"# {shipped.name} with the paths of this machine\n"
    written = out / shipped.name
    written.write_text(text + yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return written


def merge_command(recipe: Path, out: Path, adapters: Path) -> list[str]:
    """The command line; `adapters` is where models with their adapter applied are kept."""
    beside = Path(sys.executable).parent
    program = shutil.which("mergekit-yaml", path=str(beside)) or shutil.which("mergekit-yaml")
    if program is None:
        raise UnconstrainedError(f"no mergekit-yaml beside {sys.executable} nor on the PATH")
    return [program, str(recipe), str(out), "--lora-merge-cache", str(adapters)]


def run_merge(command: Sequence[str], log: Path, advance: Callable[[int], object]) -> None:
    """Run mergekit, keep what it says in `log`, pass on the percentage of its progress bars."""
    with (
        log.open("wb") as sink,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process,
    ):
        assert process.stdout is not None
        try:
            while chunk := os.read(process.stdout.fileno(), 1 << 16):
                sink.write(chunk)
                if found := _PERCENT.findall(chunk.decode("utf-8", errors="replace")):
                    advance(int(found[-1]))
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        tail = "\n".join(said[-5:]) or "it said nothing"
        raise UnconstrainedError(
            f"mergekit-yaml ended with status {process.returncode}; the end of {log}:\n{tail}"
        )
