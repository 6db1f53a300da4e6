"""The cost of every tensor method beside mergekit's task_arithmetic (`make bench`).

Prints a table and asserts nothing about time; one run of each. Parameters are those of the recipes
in recipes/methods/, so iterative methods make all their steps: minutes to hours at 270M.
MERGEKIT_UNCONSTRAINED_BENCH chooses the size (tiny, or 21M, 84M and 270M with 1, 4 and 16 layers of
one shape), MERGEKIT_UNCONSTRAINED_BENCH_METHODS some of the methods, with commas between.
Ours run with a memory_budget; what a method takes beyond the same recipe on a model of 0.9 M
parameters, which is the libraries, is to be within it, and the engine's warning is printed.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import measure
import pytest
import yaml
from measure import Usage, usage_of

pytestmark = pytest.mark.bench

SIZE = os.environ.get("MERGEKIT_UNCONSTRAINED_BENCH", "84M")
CHOSEN = os.environ.get("MERGEKIT_UNCONSTRAINED_BENCH_METHODS", "")
BUDGET = "1GiB"
RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes" / "methods").glob("*.yml"))
MERGEKIT_YAML = [sys.executable, "-m", "mergekit.scripts.run_yaml"]


def merge(folder: Path, recipe: dict[str, Any]) -> Usage:
    """One `mergekit-yaml` in a process of its own."""
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    shutil.rmtree(folder / "out", ignore_errors=True)
    options = ["--quiet", "--no-write-model-card", "--no-copy-tokenizer"]
    return usage_of([*MERGEKIT_YAML, "recipe.yml", "out", *options], folder=folder)


def recipe_of(path: Path, base: Path, experts: list[Path]) -> dict[str, Any]:
    """A recipe of recipes/methods/ for other models."""
    own = yaml.safe_load(path.read_text())
    models = [{**m, "model": str(e)} for m, e in zip(own["models"], experts, strict=True)]
    parameters = {**own.get("parameters", {}), "memory_budget": BUDGET}
    return {**own, "base_model": str(base), "models": models, "parameters": parameters}


def test_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MERGEKIT_UNCONSTRAINED_CACHE", str(tmp_path / "cache"))
    base, experts = measure.random_llamas(tmp_path, SIZE, experts=2)
    (tmp_path / "small").mkdir()
    measure.SIZES["small"] = {**measure.SIZES["tiny"], "num_hidden_layers": 16}
    small = measure.random_llamas(tmp_path / "small", "small", experts=2)
    recipe: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(e), "parameters": {"weight": 0.3}} for e in experts],
    }
    usual = merge(tmp_path, recipe)
    with capsys.disabled():
        print(f"\n{SIZE}, 2 experts and base, bf16; whole process, one run; memory_budget {BUDGET}")
        print(
            f"{'':16}{'CPU s':>9}{'MiB':>8}{'beyond':>8}{'CPU':>8}{'MiB':>7}  times "
            "task_arithmetic's; beyond: MiB beyond the libraries"
        )
        print(f"{'task_arithmetic':16}{usual.cpu_seconds:9.1f}{usual.peak_mib:8.0f}")
        for path in RECIPES:
            if CHOSEN and path.stem not in CHOSEN.split(","):
                continue
            libraries = merge(tmp_path, recipe_of(path, *small))
            used = merge(tmp_path, recipe_of(path, base, experts))
            said = (tmp_path / "bench.log").read_text()
            print(
                f"{path.stem:16}{used.cpu_seconds:9.1f}{used.peak_mib:8.0f}"
                f"{used.peak_mib - libraries.peak_mib:8.0f}"
                f"{used.cpu_seconds / usual.cpu_seconds:8.1f}{used.peak_mib / usual.peak_mib:7.2f}"
                + (f"  {said.strip()}" if "memory_budget" in said else ""),
                flush=True,
            )
