"""Worker processes: the bytes of threads, errors and logs as if there were none, no orphans."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from mergekit_unconstrained.engine import processes, workers
from mergekit_unconstrained.engine.writer import UNFINISHED
from mergekit_unconstrained.errors import MissingExtraError
from tests.conftest import TinyModels
from tests.engine.test_workers import recipe_of, run, weights

pytestmark = pytest.mark.skipif(not processes.LINUX, reason="elsewhere there are threads alone")

LOG = logging.getLogger("some.library")


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every merge is by two processes; a file that gets a line `pid tensor` for each tensor."""
    monkeypatch.setattr(processes, "WORTH_A_PROCESS", 1)
    monkeypatch.setattr(processes, "BATCH_BYTES", 1)
    monkeypatch.setattr(workers, "cores", lambda: 2)
    real = workers.Workers.work
    seen = tmp_path / "seen"

    def work(self: workers.Workers, job: workers.Job) -> str:
        with seen.open("a") as stream:
            stream.write(f"{os.getpid()} {job.output.name}\n")
        return real(self, job)

    monkeypatch.setattr(workers.Workers, "work", work)
    return seen


def pids(seen: Path) -> set[int]:
    return {int(line.split()[0]) for line in seen.read_text().splitlines()}


def in_a_worker(monkeypatch: pytest.MonkeyPatch, do: Any, tensors: int = 1) -> None:
    """Do something in a worker process, when it comes to its so manieth tensor."""
    real = workers.Workers.work
    count = 0

    def work(self: workers.Workers, job: workers.Job) -> str:
        nonlocal count
        count += 1
        if count == tensors:
            do()
        return real(self, job)

    monkeypatch.setattr(workers.Workers, "work", work)


@pytest.mark.parametrize("fast", [False, True])
def test_processes_write_the_bytes_that_threads_write(
    tmp_path: Path,
    tiny_models: TinyModels,
    forks: Path,
    monkeypatch: pytest.MonkeyPatch,
    fast: bool,
) -> None:
    recipe = recipe_of(tiny_models, density=0.5, operator="dare_ties")
    if fast:
        recipe = {**recipe, "merge_method": "dare_ties", "parameters": {}}
    options = ["--random-seed", "3", *(["--fast"] if fast else [])]
    found = weights(tmp_path, "processes", recipe, *options)
    assert os.getpid() not in pids(forks)
    assert len(pids(forks)) == 2
    assert len(forks.read_text().splitlines()) == 39
    forks.unlink()
    monkeypatch.setattr(processes, "LINUX", False)
    assert found == weights(tmp_path, "threads", recipe, *options)
    assert pids(forks) == {os.getpid()}


def test_a_merge_in_a_thread_of_a_server_forks_too(
    tmp_path: Path, tiny_models: TinyModels, forks: Path
) -> None:
    recipe = recipe_of(tiny_models)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(weights, tmp_path, "out", recipe).result()
    assert os.getpid() not in pids(forks)
    assert found == weights(tmp_path, "whole", recipe)


def test_the_hashes_are_those_of_the_files(
    tmp_path: Path, tiny_models: TinyModels, forks: Path
) -> None:
    recipe = {**recipe_of(tiny_models), "merge_method": "task_arithmetic"}
    weights(tmp_path, "out", recipe, "--fast", "--verify")
    assert pids(forks)


def test_a_worker_logs_and_warns_through_its_parent(
    tmp_path: Path,
    tiny_models: TinyModels,
    forks: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def tell() -> None:
        LOG.warning("%s has %d legs", "a worker", 6)
        warnings.warn("and two feelers", stacklevel=1)

    warnings.simplefilter("default")
    in_a_worker(monkeypatch, tell)
    weights(tmp_path, "out", recipe_of(tiny_models))
    said = [r.getMessage() for r in caplog.records if r.process not in (None, os.getpid())]
    assert said.count("a worker has 6 legs") == 2
    assert sum("and two feelers" in text for text in said) == 2


def test_an_error_in_a_worker_is_the_error_of_a_thread(
    tmp_path: Path, tiny_models: TinyModels, forks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = tmp_path / "expert"
    expert.mkdir()
    tensors = safetensors.torch.load_file(tiny_models.experts[0] / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    safetensors.torch.save_file(tensors, expert / "model.safetensors")
    (expert / "config.json").write_bytes((tiny_models.base / "config.json").read_bytes())
    recipe = recipe_of(TinyModels(tiny_models.base, (expert, *tiny_models.experts[1:])))
    by_processes = run(tmp_path, "out", recipe)
    assert pids(forks) != {os.getpid()}
    monkeypatch.setattr(processes, "LINUX", False)
    by_threads = run(tmp_path, "other", recipe)
    assert by_processes.exit_code == by_threads.exit_code == 1
    assert "model.layers.1.mlp.up_proj.weight" in by_processes.output
    assert by_processes.output == by_threads.output.replace("other", "out")


class StubbornError(Exception):
    """One that pickle can write but not read."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full; what is finished"),
        (MissingExtraError("a thing", "fusion"), 'install "mergekit-unconstrained[fusion]"'),
        (StubbornError("this", "that"), "StubbornError: this and that"),
    ],
)
def test_every_error_comes_back(
    tmp_path: Path,
    tiny_models: TinyModels,
    forks: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    said: str,
) -> None:
    def fail() -> None:
        raise error

    recipe = recipe_of(tiny_models)
    with monkeypatch.context() as patch:
        in_a_worker(patch, fail, tensors=7)
        result = run(tmp_path, "out", recipe)
    assert result.exit_code == 1
    assert said in f"{result.output} {result.exception}"
    forks.unlink()
    found = weights(tmp_path, "out", recipe)
    assert (len(forks.read_text().splitlines()) < 39) == isinstance(error, OSError)
    assert found == weights(tmp_path, "whole", recipe)


def test_what_is_not_as_planned_falls_back(
    tmp_path: Path,
    tiny_models: TinyModels,
    forks: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse() -> None:
        raise workers.CannotStreamError("the method gave nothing")

    in_a_worker(monkeypatch, refuse)
    weights(tmp_path, "out", recipe_of(tiny_models))
    assert "the method gave nothing" in caplog.text


def test_a_killed_worker_is_one_sentence_and_the_merge_goes_on(
    tmp_path: Path, tiny_models: TinyModels, forks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tiny_models)
    with monkeypatch.context() as patch:
        in_a_worker(patch, lambda: os.kill(os.getpid(), signal.SIGKILL), tensors=8)
        result = run(tmp_path, "out", recipe)
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert said.startswith(
        "Error: a process that merged was killed, most likely because the memory"
    )
    assert not (tmp_path / "out").exists()
    forks.unlink()
    found = weights(tmp_path, "out", recipe)
    assert 0 < len(forks.read_text().splitlines()) < 39  # what was noted was kept
    assert found == weights(tmp_path, "whole", recipe)


def test_workers_leave_an_interruption_to_their_parent(
    tmp_path: Path, tiny_models: TinyModels, forks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_worker(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    weights(tmp_path, "out", recipe_of(tiny_models))


def _merge_until_killed(folder: Path, recipe: dict[str, Any]) -> None:
    real = workers.Workers.work

    def work(self: workers.Workers, job: workers.Job) -> str:
        (folder / f"pid-{os.getpid()}").touch()
        time.sleep(0.05)
        return real(self, job)

    workers.Workers.work = work  # type: ignore[method-assign]
    processes.WORTH_A_PROCESS = processes.BATCH_BYTES = 1
    run(folder, "out", recipe, "--num-threads", "2")


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path, tiny_models: TinyModels) -> None:
    recipe = recipe_of(tiny_models)
    parent = multiprocessing.get_context("spawn").Process(
        target=_merge_until_killed, args=(tmp_path, recipe)
    )
    parent.start()
    until = time.monotonic() + 60
    while len(found := sorted(tmp_path.glob("pid-*"))) < 2:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    children = [int(p.name.removeprefix("pid-")) for p in found]
    assert parent.pid not in children
    while any(map(is_running, children)):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert (tmp_path / "out.partial" / f"model.safetensors{UNFINISHED}").exists()
    assert weights(tmp_path, "out", recipe) == weights(tmp_path, "whole", recipe)


def is_running(pid: int) -> bool:
    """Neither gone nor waiting for somebody to ask for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


WORTH = processes.WORTH_A_PROCESS


@pytest.mark.parametrize(
    ("sizes", "most", "device", "in_processes", "count"),
    [
        ([WORTH] * 9, 4, None, True, 4),
        ([WORTH] * 9, 4, "cpu", True, 4),
        ([WORTH] * 3, 4, None, True, 3),
        ([WORTH, WORTH - 1], 4, None, True, 0),
        ([WORTH] * 9, 1, None, True, 0),
        ([WORTH] * 9, 4, "cuda", True, 0),
        ([WORTH] * 9, 4, None, False, 0),
    ],
)
def test_so_many_processes_as_are_worth_it(
    sizes: list[int], most: int, device: str | None, in_processes: bool, count: int
) -> None:
    def job(size: int, in_processes: bool = True) -> Any:
        method = SimpleNamespace(in_processes=in_processes)
        return SimpleNamespace(
            output=SimpleNamespace(bytes=size), task=SimpleNamespace(method=method)
        )

    jobs = [*map(job, sizes), job(0, in_processes)]
    assert processes.how_many(jobs, most, device) == count
    jobs[0].task.method = SimpleNamespace()  # of somebody else's, who was not asked
    assert processes.how_many(jobs, most, device) == 0


def test_where_processes_cannot_wait_for_each_other_there_are_threads(
    tmp_path: Path, tiny_models: TinyModels, forks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(multiprocessing.get_context("fork"), "Lock", fail)
    weights(tmp_path, "out", recipe_of(tiny_models))
    assert pids(forks) == {os.getpid()}


def test_garbage_is_looked_for_again_afterwards(
    tmp_path: Path, tiny_models: TinyModels, forks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = []
    monkeypatch.setattr(processes.gc, "get_freeze_count", lambda: 0)
    monkeypatch.setattr(processes.gc, "freeze", lambda: frozen.append(True))
    monkeypatch.setattr(processes.gc, "unfreeze", lambda: frozen.append(False))
    weights(tmp_path, "out", recipe_of(tiny_models))
    assert frozen[-2:] == [True, False]
