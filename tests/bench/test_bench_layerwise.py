"""The cost of `layerwise` beside mergekit's methods, and of being discovered (`make bench`).

Prints tables and asserts nothing about time. MERGEKIT_UNCONSTRAINED_BENCH chooses the size (84M,
270M, tiny), MERGEKIT_UNCONSTRAINED_BENCH_REPEATS how often everything runs.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import measure
import pytest
import yaml
from measure import Usage, interleaved, usage_of

pytestmark = pytest.mark.bench

SIZE = os.environ.get("MERGEKIT_UNCONSTRAINED_BENCH", "84M")
REPEATS = int(os.environ.get("MERGEKIT_UNCONSTRAINED_BENCH_REPEATS", "3"))
MERGEKIT_YAML = [str(Path(sys.executable).with_name("mergekit-yaml"))]

METHODS: dict[str, dict[str, float]] = {
    "task_arithmetic": {"weight": 0.3},
    "ties": {"weight": 0.3, "density": 0.2},
    "dare_ties": {"weight": 0.3, "density": 0.5},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return measure.random_llamas(tmp_path_factory.mktemp("models"), SIZE)


def merge(folder: Path, recipe: dict, *, plugins: bool) -> Usage:
    """One `mergekit-yaml` in a process of its own."""
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [*MERGEKIT_YAML, "recipe.yml", "out", "--quiet"]
    options = ["--no-write-model-card", "--no-copy-tokenizer"]
    return usage_of([*command, *options], plugins=plugins, folder=folder)


def test_merging(
    models: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base, experts = models
    runs: dict[str, Callable[[], Usage]] = {}
    for method, parameters in METHODS.items():
        recipe = {
            "base_model": str(base),
            "models": [{"model": str(e), "parameters": parameters} for e in experts],
        }
        theirs = {**recipe, "merge_method": method}
        ours = {**recipe, "merge_method": "layerwise", "parameters": {"operator": method}}
        runs[f"{method}, mergekit"] = functools.partial(merge, tmp_path, theirs, plugins=False)
        runs[f"{method}, layerwise"] = functools.partial(merge, tmp_path, ours, plugins=True)
    found = interleaved(runs, REPEATS)
    config = measure.llama_config(SIZE)
    entries = sum(math.prod(shape) for shape in measure.llama_shapes(config).values())
    lines = [
        f"{len(experts)} experts and base, {entries / 1e6:.0f} M parameters, bf16; "
        f"median of {REPEATS}, whole process",
        f"{'':18} {'mergekit':>18} {'layerwise':>18} {'ratio':>14}",
        f"{'':18} {'CPU s':>9}{'MiB':>9} {'CPU s':>9}{'MiB':>9} {'CPU':>7}{'MiB':>7}",
    ]
    for method in METHODS:
        (theirs, _), (ours, _) = (found[f"{method}, {who}"] for who in ("mergekit", "layerwise"))
        lines.append(
            f"{method:18} {theirs.cpu_seconds:9.2f}{theirs.peak_mib:9.0f} "
            f"{ours.cpu_seconds:9.2f}{ours.peak_mib:9.0f} "
            f"{ours.cpu_seconds / theirs.cpu_seconds:7.2f}{ours.peak_mib / theirs.peak_mib:7.2f}"
        )
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def test_start_up(capsys: pytest.CaptureFixture) -> None:
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        "mergekit-yaml --help": [*MERGEKIT_YAML, "--help"],
    }
    runs = {
        f"{name}, {'on' if plugins else 'off'}": functools.partial(
            usage_of, command, plugins=plugins
        )
        for name, command in commands.items()
        for plugins in (False, True)
    }
    found = interleaved(runs, 2 * REPEATS + 1)
    lines = [
        f"start-up, CPU s, median of {2 * REPEATS + 1} (least to most)",
        f"{'':26} {'hook off':>22} {'hook on':>22} {'extra ms':>9}",
    ]
    for name in commands:
        (off, offs), (on, ons) = (found[f"{name}, {state}"] for state in ("off", "on"))
        lines.append(
            f"{name:26} {off.cpu_seconds:8.3f} ({offs[0]:.3f}-{offs[-1]:.3f}) "
            f"{on.cpu_seconds:8.3f} ({ons[0]:.3f}-{ons[-1]:.3f}) "
            f"{1000 * (on.cpu_seconds - off.cpu_seconds):9.0f}"
        )
    with capsys.disabled():
        print("\n" + "\n".join(lines))
