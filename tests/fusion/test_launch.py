"""Training in several processes on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from train_feed import make_job, make_pivot

from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.fusion.launch import launch, run
from mergekit_unconstrained.fusion.training.train import TrainJob

FEED = "train_feed:open_feed"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainJob:
    """Children find the feed beside this file, and one thread each is enough."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return job_of(tmp_path)


def job_of(folder: Path, name: str = "out", **changes: Any) -> TrainJob:
    pivot = folder / "pivot"
    if not pivot.exists():
        make_pivot(pivot)
    changes = {
        "feed": {"count": 24},
        "device_batch_size": 2,
        "training": {"use_cpu": True},
    } | changes
    return make_job(pivot, folder / name, **changes)


def test_one_process_is_this_one(job: TrainJob) -> None:
    result = launch(job, 1, FEED)
    assert result.folder == job.out
    assert result.steps == 6


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(job: TrainJob, tmp_path: Path) -> None:
    alone = job_of(tmp_path, "alone")
    first, second = run(alone, FEED), launch(job, 2, FEED)
    histories = [json.loads((j.out / "history.json").read_text()) for j in (alone, job)]
    shapes = [h["batch_shape"] for h in histories]
    assert shapes == [
        {"processes": 1, "passes": 4, "conversations": 2},
        {"processes": 2, "passes": 2, "conversations": 2},
    ]
    for key in ("loss", "gold_loss", "fusion_loss", "grad_norm"):
        series = [[entry[key] for entry in h["log"]] for h in histories]
        assert series[0] == pytest.approx(series[1], abs=1e-5)
    assert first.bits_per_byte == pytest.approx(second.bits_per_byte, abs=1e-5)
    weights = [safetensors.torch.load_file(j.out / "model.safetensors") for j in (alone, job)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_stopped_run_of_two_processes_goes_on_in_its_second_epoch(
    job: TrainJob, tmp_path: Path
) -> None:
    """Each process finds its place in the second epoch's order."""
    alone = job_of(tmp_path, "alone")
    run(alone, FEED)
    # of each process two a step, and one that is fetched ahead
    with pytest.raises(DataError, match="broke off"):
        launch(job_of(tmp_path, feed={"count": 24, "batches": 10}), 2, FEED)
    assert sorted(p.name for p in job.checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    launch(job, 2, FEED)
    series = [
        [entry["loss"] for entry in json.loads((j.out / "history.json").read_text())["log"]]
        for j in (alone, job)
    ]
    assert series[0] == pytest.approx(series[1], abs=1e-5)


@pytest.mark.slow
def test_an_error_in_a_process_is_the_error_here(tmp_path: Path, job: TrainJob) -> None:
    with pytest.raises(DataError, match="the training set is empty"):
        launch(job_of(tmp_path, feed={"count": 0}), 2, FEED)
    with pytest.raises(RuntimeError, match=r"(?s)ended with status 1.*KeyError"):
        launch(job_of(tmp_path, feed={"no count": 0}), 2, FEED)


PARENT = """
import sys
from pathlib import Path
from mergekit_unconstrained.fusion.launch import launch
from mergekit_unconstrained.fusion.training.train import TrainJob
launch(TrainJob.from_json(Path(sys.argv[1]).read_text()), 2, "train_feed:open_feed")
"""


@pytest.mark.slow
def test_nothing_goes_on_training_when_the_command_is_killed(tmp_path: Path, job: TrainJob) -> None:
    long = job_of(tmp_path, max_steps=100000, save_steps=5)
    (tmp_path / "job.json").write_text(long.to_json(), encoding="utf-8")
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "job.json")])
    _until(lambda: list(long.checkpoints.glob("checkpoint-*")), 120)
    family = _descendants(parent.pid)
    assert len(family) >= 3  # the launcher and two workers
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _until(lambda: not any(map(_alive, family)), 60)


def _until(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _descendants(pid: int) -> list[int]:
    found = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [d for child in found for d in _descendants(child)]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
