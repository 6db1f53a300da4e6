"""Starting a stage in one process or several.

The front command stays one process: it writes the job to a file, accelerate's launcher starts
`worker.py` in every process, and what went wrong there is raised here as the same error.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from mergekit_unconstrained import errors
from mergekit_unconstrained.errors import RecipeError, UnconstrainedError
from mergekit_unconstrained.fusion.training.train import Trained, TrainJob, train

FEED = "mergekit_unconstrained.fusion.feed:open_feed"
"""What opens a job's feed, module:function."""
TRAIN = "mergekit_unconstrained.fusion.launch:train_text"
JOB, LOG = "job.json", "launch.log"
POLL_SECONDS = 1.0


def run(job: TrainJob, feed: str = FEED) -> Trained:
    """Open the job's feed and train in this process."""
    module, _, function = feed.partition(":")
    train_set, eval_set = getattr(importlib.import_module(module), function)(job.feed)
    return train(job, train_set, eval_set)


def launch(job: TrainJob, processes: int, feed: str = FEED) -> Trained:
    """Train in so many processes on this machine and wait for them.

    Errors as `train`; RecipeError when there are fewer accelerators than processes.
    """
    if processes == 1:
        return run(job, feed)
    cpu = bool(job.settings.training.get("use_cpu")) or not torch.accelerator.is_available()
    if not cpu and processes > (devices := torch.accelerator.device_count()):
        raise RecipeError(
            f"settings: processes {processes} needs as many accelerators, and this machine has "
            f"{devices}"
        )
    in_processes(job.to_json(), TRAIN, feed, processes=processes, cpu=cpu)
    return Trained.read(job.out)


def train_text(text: str, feed: str) -> None:
    """What every worker of a training does: a job as TrainJob.to_json writes it."""
    run(TrainJob.from_json(text), feed)


def in_processes(
    text: str,
    task: str,
    *arguments: str,
    processes: int,
    cpu: bool,
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """Call a function in several processes and wait for them.

    task: "module:function", called with `text` and the arguments. meanwhile: called now and then.
    The error of the worker that failed first is raised here.
    """
    with tempfile.TemporaryDirectory(prefix="fusion-") as name:
        folder = Path(name)
        (folder / JOB).write_text(text, encoding="utf-8")
        command = [*_command(folder, processes), task, *arguments]
        code = _wait(command, folder, cpu, meanwhile)
        if code:
            raise _failure(folder, code)


def _command(folder: Path, processes: int) -> list[str]:
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        # also on CPUs: it means several processes on this machine; `--cpu` would start one
        "--multi_gpu",
        *("--num_processes", str(processes), "--num_machines", "1"),
        *("--main_process_ip", "127.0.0.1", "--main_process_port", "0"),
        # precision and compilation are the job's
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("-m", "mergekit_unconstrained.fusion.worker", str(folder / JOB)),
    ]


def _wait(command: list[str], folder: Path, cpu: bool, meanwhile: Callable[[], object]) -> int:
    """Run the launcher; its messages go to a file, as they would break the progress bar."""
    environment = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if _linux() else {}
    environment |= os.environ
    if cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    with (folder / LOG).open("wb") as log:
        # Workers end when their standard input does: this process may be killed.
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log, env=environment)
        try:
            while True:
                try:
                    return child.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    meanwhile()
        finally:
            if child.stdin is not None:
                child.stdin.close()
            child.wait()


def _failure(folder: Path, code: int) -> Exception:
    """The error of the worker that failed first."""
    told = sorted(folder.glob("error-*.json"), key=lambda file: file.stat().st_mtime_ns)
    if not told:
        tail = (folder / LOG).read_text(encoding="utf-8", errors="replace")[-4000:]
        return RuntimeError(f"the processes ended with status {code}:\n{tail}")
    found = json.loads(told[0].read_text(encoding="utf-8"))
    kind = getattr(errors, found["kind"], UnconstrainedError)
    error: UnconstrainedError = kind.__new__(kind)
    UnconstrainedError.__init__(error, found["message"])  # constructors differ, messages do not
    return error


def _linux() -> bool:
    return sys.platform == "linux"
