"""Searches that are killed at random moments, and searches by two processes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
MAIN = "from mergekit_unconstrained.cli import main; main()"
COMMAND = (sys.executable, "-c", MAIN, "search")


def run(*arguments: Any) -> None:
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def history(out: Path) -> Any:
    found = json.loads((out / "report.json").read_text())["history"]
    return {k: [(f["values"], f["value"], f["dropped"]) for f in v] for k, v in found.items()}


def test_ten_kills_at_random_moments_lose_and_repeat_nothing(
    search_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = search_file(budget=40, baselines=["random"])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    started = time.monotonic()
    run(path, whole)
    length = time.monotonic() - started
    generator = random.Random(0)
    for _ in range(10):
        with subprocess.Popen(
            [*COMMAND, str(path), str(parts)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                process.wait(timeout=generator.uniform(0.3, 0.9) * length)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        if parts.exists():
            break
    if not parts.exists():
        run(path, parts)
    assert history(whole) == history(parts)
    spent = [json.loads((out / "report.json").read_text())["studies"] for out in (whole, parts)]
    assert [s["examples"] for s in spent[0]] == [s["examples"] for s in spent[1]]
    weights = "model.safetensors"
    assert (whole / weights).read_bytes() == (parts / weights).read_bytes()


def test_two_processes_finish_one_study_together(
    search_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = search_file(budget=60, baselines=["uniform_random"])
    out = tmp_path / "out"
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    with subprocess.Popen(
        [*COMMAND, "worker", str(path), str(out), "--storage", storage],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as helper:
        run(path, out, "--storage", storage)
        said = helper.communicate(timeout=120)[1].decode()
    assert helper.returncode == 0, said
    found = history(out)
    assert {len(study) for study in found.values()} == {60}
    different = {json.dumps(f[0], sort_keys=True) for f in found["uniform (random)"]}
    assert len(different) == 60  # nobody drew what another one drew
