"""Benchmarks out of lm-evaluation-harness: by name or from a YAML file, and quietly.

Written against lm-eval 0.4.13.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.errors import (
    DataError,
    MissingExtraError,
    RecipeError,
    UnconstrainedError,
)

SHOTS_SEED = 1234  # lm_eval's own


def load_benchmark(task: str, local: Path | None, who: str) -> Any:
    """lm-eval's task object of that name, or of the YAML file `local`; RecipeError, DataError.

    who: the task of the tasks file, for messages.
    """
    if local is not None and not local.is_file():
        raise RecipeError(
            f"task {who!r}: there is no {str(local)!r} (paths in a tasks file are relative to it)"
        )
    try:
        with quiet():
            loaded = _loaded(task, local, who)
    except UnconstrainedError:
        raise
    except Exception as error:
        raise DataError(
            f"task {who!r}: lm-eval cannot load {task} ({in_a_line(error)}); its data "
            "must be at hand or downloadable"
        ) from error
    if loaded.get("groups") or len(loaded["tasks"]) != 1:
        raise RecipeError(
            f"task {who!r}: {task} is a group; name one of its tasks. "
            f"{suggest('', list(loaded['tasks'])[:20])}"
        )
    (found,) = loaded["tasks"].values()
    return found


def _loaded(task: str, local: Path | None, who: str) -> Any:
    path = local or packaged(task)
    if path is not None:
        return manager(defaults=False).load(_with_data_beside(path) if local else str(path))
    index = manager(defaults=True)
    if task not in index.all_tasks:
        near = suggest(task, index.all_tasks)
        near = near if near.startswith("Did you mean") else "`lm-eval ls tasks` lists all."
        raise RecipeError(f"task {who!r}: lm-eval has no task {task!r}. {near}")
    return index.load(task)


def lm_eval(module: str) -> Any:
    """A module of lm-eval; MissingExtraError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError("a task of `kind: harness`", "eval") from error


@functools.cache
def manager(*, defaults: bool) -> Any:
    """lm-eval's index of tasks; with its own ten thousand it takes half a minute to build."""
    return lm_eval("lm_eval.tasks").TaskManager(include_defaults=defaults)


def packaged(name: str) -> Path | None:
    """The file of a task that lm-eval brings, where it is named like the task; spares the index."""
    index = lm_eval("lm_eval.tasks._index")
    root = Path(lm_eval("lm_eval.tasks").__file__).parent
    if not re.fullmatch(r"[\w.-]+", name):
        return None
    for path in sorted(root.rglob(f"{name}.yaml")):
        entry = index.TaskIndex.entry_from_path(path)
        if entry is not None and entry.name == name and entry.kind.name == "TASK":
            return path
    return None


def _with_data_beside(path: Path) -> dict[str, Any]:
    """The settings of a YAML file; data files that lie beside it are found wherever one works."""
    config: dict[str, Any] = lm_eval("lm_eval.tasks._yaml_loader").load_yaml(path)
    told = config.get("dataset_kwargs")
    if isinstance(told, dict) and "data_files" in told:
        files = _beside(told["data_files"], path.parent.resolve())
        config["dataset_kwargs"] = {**told, "data_files": files}
    return config


def _beside(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {key: _beside(value, folder) for key, value in files.items()}
    if isinstance(files, list):
        return [_beside(value, folder) for value in files]
    return str(folder / files) if isinstance(files, str) and (folder / files).is_file() else files


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what lm-eval says to those who call it by hand."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def watched(model: Any) -> Iterator[None]:
    """Logits of NaN raise: lm-eval would take an answer out of them."""
    import torch

    from mergekit_unconstrained.evaluation.generation import NOT_FINITE

    def look(_module: Any, _inputs: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        # the last position has seen all others; in the padding behind shorter rows it has too
        if logits is not None and not torch.isfinite(logits[:, -1].amax(dim=-1)).all():
            raise FloatingPointError(NOT_FINITE)

    handle = model.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def seeded(device: Any) -> Iterator[None]:
    """For tasks that draw their answers at random."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(SHOTS_SEED)
        yield


def in_a_line(error: Exception) -> str:
    """What went wrong, in a line."""
    if isinstance(error, FloatingPointError):
        return str(error)
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__
