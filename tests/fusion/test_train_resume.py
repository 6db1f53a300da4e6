"""A run that was stopped goes on as if nothing had happened."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from train_feed import MeasuredFeed, RandomFeed, make_job, make_pivot

from mergekit_unconstrained.fusion.training import checkpoints, trainer
from mergekit_unconstrained.fusion.training.train import TrainJob, train

SAME = ("step", "epoch", "loss", "gold_loss", "fusion_loss", "learning_rate", "grad_norm")


@pytest.fixture(scope="module", autouse=True)
def _light_garbage() -> Iterator[None]:
    """Every run collects garbage twice; what torch and transformers brought is not worth a look."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def pivot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With dropout, so that the state of the random numbers matters."""
    return make_pivot(tmp_path_factory.mktemp("pivot"), attention_dropout=0.3)


class Stop(transformers.TrainerCallback):
    """Ctrl-C at the beginning of a step. step: how many were made."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


Outcome = tuple[list[dict[str, Any]], list[dict[str, Any]], bytes]


def outcome(job: TrainJob) -> Outcome:
    """What two runs must have in common: the series, and the weights bit for bit."""
    found = json.loads((job.out / "history.json").read_text(encoding="utf-8"))
    log = [{key: e[key] for key in SAME if key in e} for e in found["log"]]
    return log, found["development"], (job.out / "model.safetensors").read_bytes()


def feeds() -> tuple[RandomFeed, RandomFeed]:
    """21 conversations in steps of 8: an epoch does not come out even."""
    return MeasuredFeed(21), RandomFeed(10, seed=1)


@pytest.fixture(scope="module")
def whole(pivot: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Outcome]:
    """What an uninterrupted run gives. rank: of its adapter."""
    done: dict[int, Outcome] = {}

    def run(rank: int) -> Outcome:
        if rank not in done:
            job = make_job(pivot, tmp_path_factory.mktemp("whole") / "out", lora_rank=rank)
            train(job, *feeds())
            done[rank] = outcome(job)
        return done[rank]

    return run


def stopped(job: TrainJob, step: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(job, *feeds(), callbacks=[Stop(step)])


@pytest.mark.parametrize(("rank", "step"), [(0, 2), (0, 3), (0, 5), (2, 5)])
def test_a_stopped_run_ends_like_an_uninterrupted_one(
    pivot: Path, tmp_path: Path, whole: Callable[[int], Outcome], rank: int, step: int
) -> None:
    """Within an epoch of three steps and at its end, at a checkpoint and after it."""
    job = make_job(pivot, tmp_path / "out", lora_rank=rank, save_steps=1 + (step == 5))
    stopped(job, step)
    train(job, *feeds())
    found = outcome(job)
    expected = whole(rank)
    assert (found[0], found[2]) == (expected[0], expected[2])
    assert found[1][0] == expected[1][0]
    assert found[1][-1] == expected[1][-1]


def test_a_run_that_ended_before_its_result_was_written_only_writes_it(
    pivot: Path,
    tmp_path: Path,
    whole: Callable[[int], Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = make_job(pivot, tmp_path / "out")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mergekit_unconstrained.fusion.training.train.write_target", stop)
        with pytest.raises(KeyboardInterrupt):
            train(job, *feeds())
    assert not job.out.exists()
    monkeypatch.setattr(trainer.FusionTrainer, "training_step", None)
    train(job, *feeds())
    assert outcome(job) == whole(0)


@pytest.mark.parametrize("harm", ["half a file", "no list", "no optimizer"])
def test_a_half_written_checkpoint_is_removed(
    pivot: Path, tmp_path: Path, whole: Callable[[int], Outcome], harm: str
) -> None:
    job = make_job(pivot, tmp_path / "out")
    stopped(job, 5)
    last = job.checkpoints / "checkpoint-4"
    if harm == "half a file":
        with (last / "model.safetensors").open("r+b") as stream:
            stream.truncate(100)
    else:
        (last / (checkpoints.LIST if harm == "no list" else "optimizer.pt")).unlink()
    begun: list[int] = []

    class Note(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            begun.append(state.global_step)
            assert sorted(p.name for p in job.checkpoints.iterdir()) == ["checkpoint-2"]

    train(job, *feeds(), callbacks=[Note()])
    assert begun == [2]
    assert outcome(job) == whole(0)


def test_no_more_than_two_checkpoints_are_kept(pivot: Path, tmp_path: Path) -> None:
    job = make_job(pivot, tmp_path / "out", save_steps=1)
    counts: list[int] = []

    class Count(transformers.TrainerCallback):
        def on_save(self, *_: Any, **__: Any) -> None:
            counts.append(len(list(job.checkpoints.iterdir())))
            assert checkpoints.keep_complete(job.checkpoints) is not None

    train(job, *feeds(), callbacks=[Count()])
    assert counts == [1, 2, 2, 2, 2, 2]


def test_a_smaller_device_batch_continues_where_memory_ran_out(pivot: Path, tmp_path: Path) -> None:
    """The place in the data is counted in steps, which keep their conversations."""
    plain = make_pivot(tmp_path / "plain")  # without dropout
    whole = make_job(plain, tmp_path / "whole")
    train(whole, *feeds())
    stopped(make_job(plain, tmp_path / "out"), 5)
    job = make_job(plain, tmp_path / "out", device_batch_size=2)
    train(job, *feeds())
    found, expected = ([e["loss"] for e in outcome(j)[0]] for j in (job, whole))
    assert found == pytest.approx(expected, abs=1e-5)


CHILD = """
import sys
from pathlib import Path
from train_feed import open_feed
from mergekit_unconstrained.fusion.training.train import TrainJob, train
job = TrainJob.from_json(Path(sys.argv[1]).read_text())
train(job, *open_feed(job.feed))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_the_same(pivot: Path, tmp_path: Path) -> None:
    """kill -9 at random moments, also while checkpoints and the result are written."""
    changes: dict[str, Any] = {"max_steps": 16, "save_steps": 1}
    whole = make_job(pivot, tmp_path / "whole", **changes, feed={"count": 21})
    train(whole, RandomFeed(21), RandomFeed(10, seed=1))
    job = make_job(pivot, tmp_path / "out", **changes, feed={"count": 21, "pause": 0.01})
    (tmp_path / "job.json").write_text(job.to_json(), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "job.json")]
    moments = random.Random(0)
    killed = 0
    while True:
        child = subprocess.Popen(command, env=environment)
        started = job.checkpoints.exists() and bool(list(job.checkpoints.iterdir()))
        try:
            # long enough to start and, at the first attempt, to write a checkpoint
            deadline = time.monotonic() + 120
            before = _latest(job)
            while child.poll() is None and _latest(job) <= before + (not started):
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.6))
        finally:
            child.send_signal(signal.SIGKILL)
        if child.wait() == 0:
            break
        killed += 1
    assert killed >= 3
    assert outcome(job) == outcome(whole)
    shutil.rmtree(job.out)


def _latest(job: TrainJob) -> int:
    if job.out.exists():
        return 1 << 30
    steps = [int(p.name.split("-")[1]) for p in job.checkpoints.glob("checkpoint-*")]
    return max(steps, default=0)
