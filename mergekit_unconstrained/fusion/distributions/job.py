"""The collecting stage as a job that another process can read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mergekit_unconstrained.fusion.data.prepared import load_prepared
from mergekit_unconstrained.fusion.distributions.collect import Collected, collect, header_for
from mergekit_unconstrained.fusion.distributions.store import Store
from mergekit_unconstrained.fusion.launch import in_processes
from mergekit_unconstrained.fusion.models import LocalModel
from mergekit_unconstrained.fusion.settings import FusionSettings

COLLECT = "mergekit_unconstrained.fusion.distributions.job:collect_text"


@dataclass(frozen=True)
class CollectJob:
    """One model over the prepared conversations.

    model: LocalModel.describe(). data: the data stage's folder. part: all conversations, or only
    those held out.
    """

    model: Mapping[str, Any]
    data: Path
    store: Path
    settings: FusionSettings
    part: Literal["all", "held_out"] = "all"

    def to_json(self) -> str:
        """Text from which `from_json` makes an equal job."""
        paths = {key: str(getattr(self, key).absolute()) for key in ("data", "store")}
        settings = self.settings.model_dump(mode="json")
        return json.dumps({**vars(self), **paths, "settings": settings})

    @classmethod
    def from_json(cls, text: str) -> CollectJob:
        """The reverse of `to_json`."""
        found = json.loads(text)
        paths = {key: Path(found[key]) for key in ("data", "store")}
        settings = FusionSettings.model_validate(found["settings"])
        return cls(**{**found, **paths, "settings": settings})


def run(
    job: CollectJob,
    advance: Callable[[int], Any] = lambda _: None,
    *,
    rank: int = 0,
    world: int = 1,
) -> Collected:
    """Collect this process's share. advance: told how many more conversations are done."""
    model = LocalModel.from_description(dict(job.model))
    train, held_out = load_prepared(job.data)
    conversations = held_out if job.part == "held_out" else [*train, *held_out]
    header = header_for(model.identity, model.encoder, job.settings, job.data.name)
    store = Store(job.store, header, writer=rank)
    seen = 0

    def progress(done: Collected) -> None:
        nonlocal seen
        now = done.conversations + done.already
        advance(now - seen)
        seen = now

    settings = job.settings
    return collect(
        model.weights,
        conversations,
        model.encoder,
        store,
        settings,
        rank=rank,
        world=world,
        name=model.name,
        progress=progress,
    )


def collect_in(job: CollectJob, processes: int, advance: Callable[[int], Any]) -> Collected | None:
    """Collect in so many processes on this machine and wait; what was done, of a single one."""
    if processes == 1:
        return run(job, advance)
    Store(job.store).sweep()  # of what killed writers left, before several write at once
    store, seen = Store(job.store), 0

    def look() -> None:
        nonlocal seen
        store.refresh()
        advance(len(store) - seen)
        seen = len(store)

    cpu = not torch.accelerator.is_available()
    in_processes(job.to_json(), COLLECT, processes=processes, cpu=cpu, meanwhile=look)
    return None


def collect_text(text: str) -> None:
    """What every worker does: its share of a job as CollectJob.to_json writes it."""
    rank, world = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE"))
    run(CollectJob.from_json(text), rank=rank, world=world)
