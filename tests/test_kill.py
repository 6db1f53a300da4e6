"""A merge killed at any moment leaves no final name, and the same command finishes it."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mergekit_unconstrained.engine.digest import sha256
from tests.conftest import TinyModels

pytestmark = pytest.mark.slow


def test_kill_nine_at_random_moments_loses_nothing(tmp_path: Path, tiny_models: TinyModels) -> None:
    recipe = {
        "merge_method": "layerwise",
        "base_model": str(tiny_models.base),
        "models": [
            {"model": str(m), "parameters": {"weight": 0.4, "density": 0.5}}
            for m in tiny_models.experts
        ],
        "parameters": {"operator": "dare_ties", "seed": 3},
        "dtype": "bfloat16",
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", "recipe.yml"]

    started = time.monotonic()
    subprocess.run([*command, "whole"], cwd=tmp_path, check=True, capture_output=True)
    whole = time.monotonic() - started
    names = {p.name for p in (tmp_path / "whole").iterdir()}

    moments = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen([*command, "out"], cwd=tmp_path, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.5, 1.0) * whole)
        process.kill()
        process.wait()
        out = tmp_path / "out"
        if out.exists():  # it was faster than the kill
            assert {p.name for p in out.iterdir()} == names
            out.rename(tmp_path / f"finished{moments.random()}")
    subprocess.run([*command, "out"], cwd=tmp_path, check=True, capture_output=True)
    assert sha256(tmp_path / "out/model.safetensors") == sha256(
        tmp_path / "whole/model.safetensors"
    )
    assert not (tmp_path / "out.partial").exists()
