"""The stages of a fusion up to the trained targets, each a folder that is made once.

    data -> distributions of every model -> alignment of every source -> targets -> training

Each function gives the finished stage, from an earlier run where its inputs are the same. No stage
calls an earlier one: it is handed what it needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.fusion.alignment.aligners import Pairs, build_map, make_aligner
from mergekit_unconstrained.fusion.alignment.quality import measure
from mergekit_unconstrained.fusion.data.prepared import dataset_identity, load_prepared, prepare
from mergekit_unconstrained.fusion.distributions.job import CollectJob, collect_in
from mergekit_unconstrained.fusion.distributions.store import Store
from mergekit_unconstrained.fusion.feed import open_feed
from mergekit_unconstrained.fusion.launch import launch
from mergekit_unconstrained.fusion.models import LocalModel, identity_of
from mergekit_unconstrained.fusion.plan import FusionPlan
from mergekit_unconstrained.fusion.records import Conversation
from mergekit_unconstrained.fusion.scores import Score, score
from mergekit_unconstrained.fusion.settings import FusionSettings
from mergekit_unconstrained.fusion.training.train import HISTORY, TrainJob
from mergekit_unconstrained.fusion.workdir import Stage, WorkDir, safe

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], Any]]]
"""progress(what, total) gives a function that is told how many more were done."""

SAMPLE = 200
"""Conversations on which alignment is measured."""


@dataclass(frozen=True)
class Run:
    """A plan whose models lie here, the folder of its stages, and who is told of progress."""

    plan: FusionPlan
    pivot: LocalModel
    sources: tuple[LocalModel, ...]
    work: WorkDir
    progress: Progress
    quiet: bool = False

    @property
    def models(self) -> tuple[LocalModel, ...]:
        """The pivot and the sources."""
        return (self.pivot, *self.sources)

    @property
    def settings(self) -> FusionSettings:
        """The plan's."""
        return self.plan.settings

    def as_pivot(self, name: str, weights: Path) -> LocalModel:
        """A trained model: other weights that read as the pivot does."""
        files = [f for f in weights.iterdir() if f.suffix == ".safetensors"]
        return LocalModel(
            name=name,
            weights=weights,
            tokenizer_folder=self.pivot.tokenizer_folder,
            identity=identity_of(files),
            max_length=self.pivot.max_length,
            chat_template=self.pivot.chat_template,
        )

    @property
    def needs_pivot(self) -> bool:
        """Whether the target rule asks for the pivot's own distributions."""
        s = self.settings
        if s.loss in ("uld", "gld") or s.target == "teacher":
            return False
        return s.include_pivot or s.target == "max_margin"


def prepare_data(run: Run) -> Stage:
    """Read the data with every model's tokenizer."""
    s = run.settings
    stage = run.work.stage(
        "data",
        {
            "dataset": dataset_identity(run.plan.dataset),
            "columns": s.columns.model_dump(),
            "models": [m.reading for m in run.models],
            **{k: getattr(s, k) for k in ("split", "max_rows", "max_length", "eval_share", "seed")},
        },
    )
    if not stage.finished:
        with stage.running() as results, run.progress("reading the data", 0) as advance:
            results |= prepare(run.plan.dataset, s, run.models, stage.folder, advance)
    return stage


def collect(run: Run, data: Stage, model: LocalModel) -> Stage:
    """The distributions of one model over the responses."""
    s = run.settings
    stage = run.work.stage(
        f"distributions/{safe(model.name)}",
        {
            "data": data.key,
            "weights": model.identity,
            **model.reading,
            **{k: getattr(s, k) for k in ("top_k", "temperature", "collect_dtype")},
        },
    )
    if stage.finished:
        return stage
    with stage.running() as results:
        job = CollectJob(
            model=model.describe(),
            data=data.folder.absolute(),
            store=stage.folder.absolute() / "store",
            settings=s,
        )
        total = int(data.results["conversations"])
        with run.progress(f"distributions of {model.name}", total) as advance:
            done = collect_in(job, s.processes, advance)
        if done is not None and not done.already:  # a resumed run's clock says nothing
            results["tokens_per_second"] = done.tokens_per_second
            results["outside_forward"] = 1.0 - done.forward_seconds / done.seconds
        results |= _scores(Store(job.store), data, len(model.table.pieces))
    return stage


def align(run: Run, data: Stage, source: LocalModel, distributions: Stage) -> Stage:
    """The map into the pivot's vocabulary, and what alignment achieves on a sample.

    ModelError when fewer positions than `min_coverage` receive a distribution.
    """
    s = run.settings
    names = ("alignment", "vocabulary_map", "inside", "chain", "published_defects")
    inputs: dict[str, Any] = {"pivot": run.pivot.reading, "source": source.reading}
    inputs |= {"distributions": distributions.key, **{k: getattr(s, k) for k in names}}
    stage = run.work.stage(f"alignment/{safe(source.name)}", inputs)
    if not stage.finished:
        with stage.running() as results, run.progress(f"aligning {source.name}", 0):
            store = Store(distributions.folder / "store")
            train, _ = load_prepared(data.folder)
            corpus = _pairs(run, store, train)
            results["map"] = build_map(source, run.pivot, s, stage.folder, corpus)
            aligner = make_aligner(source, run.pivot, s, stage.folder)
            sample = train[:SAMPLE]
            records = store.read([c.row for c in sample])
            encoded = run.pivot.encoder.encode_many(sample)
            found = measure(records, encoded, aligner)
            results |= found.as_dict() | {"label_consistency": found.all.label_consistency}
    coverage = float(stage.results["coverage"])
    if coverage < s.min_coverage:
        raise ModelError(
            f"only {coverage:.1%} of the pivot's positions receive a distribution from "
            f"{source.name} (min_coverage is {s.min_coverage:.0%}): their tokenizers share too few "
            "boundaries, or the wrong tokenizer lies in a folder. Lower min_coverage to go on"
        )
    return stage


def _pairs(run: Run, store: Store, conversations: Sequence[Conversation]) -> Pairs:
    for start in range(0, len(conversations), SAMPLE):
        part = conversations[start : start + SAMPLE]
        yield store.read([c.row for c in part]), run.pivot.encoder.encode_many(part)


def targets(
    run: Run, data: Stage, own: Stage | None, parts: Mapping[str, tuple[Stage, Stage]]
) -> Stage:
    """What training will be fed, described, with the share every model wins on a sample.

    parts: source -> its distributions and alignment; name of the stage: the sources together.
    """
    s = run.settings
    sources = [m for m in run.sources if m.name in parts]
    names = ("target", "per", "compare", "include_pivot", "rest", "unaligned", "loss")
    inputs: dict[str, Any] = {k: getattr(s, k) for k in (*names, "shuffle_source", "seed")}
    inputs["parts"] = [[stage.key for stage in parts[m.name]] for m in sources]
    inputs["weights"] = [m.weight for m in sources]
    inputs["pivot"] = own.key if own is not None else None
    stage = run.work.stage(f"targets/{target_name(sources)}", inputs)
    if not stage.finished:
        with stage.running() as results, run.progress("fusing a sample", 0):
            description = {
                "settings": s.model_dump(),
                "pivot": run.pivot.describe(),
                "data": str(data.folder.absolute()),
                "pivot_store": _store(own),
                "sources": [_part(m, *parts[m.name]) for m in sources],
            }
            results |= {"feed": description, **_winners(run, description, sources)}
    return stage


def target_name(sources: Sequence[LocalModel]) -> str:
    """The name of what is trained with these sources."""
    return "+".join(safe(m.name) for m in sources)


def _part(source: LocalModel, distributions: Stage, alignment: Stage) -> dict[str, Any]:
    return {
        "model": source.describe(),
        "store": _store(distributions),
        "maps": str(alignment.folder.absolute()),
    }


def _store(stage: Stage | None) -> str | None:
    return str((stage.folder / "store").absolute()) if stage is not None else None


def _winners(
    run: Run, description: Mapping[str, Any], sources: Sequence[LocalModel]
) -> dict[str, Any]:
    """Share of a sample's conversations that each model won, and of positions with a target."""
    feed, _ = open_feed(description)
    sample = feed.conversations[:SAMPLE]
    found = feed.targets(sample, run.pivot.encoder.encode_many(sample))
    winners = np.array([t.winner for t in found])
    first = 0 if feed.pivot_store is not None else 1
    names = [run.pivot.name, *(m.name for m in sources)][first:]
    shares = {name: float((winners == i + first).mean()) for i, name in enumerate(names)}
    if (winners < 0).any():
        shares["mixture"] = float((winners < 0).mean())
    used = np.concatenate([t.used for t in found]) if found else np.zeros(0)
    return {"sample": len(sample), "won": shares, "used": float(used.mean()) if len(used) else 0.0}


def _scores(store: Store, data: Stage, words: int) -> dict[str, Any]:
    """A model's bits per byte over the responses to train on and those held out, and bits per
    token: of all responses, and of tokens picked at random from so many words."""
    held_out = {c.row for c in load_prepared(data.folder)[1]}
    parts = {
        "train": score(r for r in store if r.row not in held_out),
        "held_out": score((r for r in store if r.row in held_out), parts=True),
    }
    counted = [(len(r.tokens), r.nats) for r in store]
    tokens, nats = (sum(column) for column in zip(*counted, strict=True))
    found = {"tokens": tokens, "bits_per_token": nats / math.log(2) / tokens}
    found |= {"chance_bits_per_token": math.log2(words)}
    return found | {k: vars(v) if v is not None else None for k, v in parts.items()}


def training_job(
    run: Run, target: Stage, sources: Sequence[LocalModel], *, sft: bool = False
) -> tuple[Stage, TrainJob]:
    """The stage of one training and what its worker is told. sft: the gold responses alone."""
    plan, s = run.plan, run.settings
    feed = dict(target.results["feed"])
    if sft:
        feed |= {"sources": [], "pivot_store": None}
    # Not device_batch_size: it is lowered when memory runs out, and the same run goes on.
    fields = ["schedule", "warmup_ratio", "batch_size", "weight_decay"]
    fields += ["lora_alpha", "dtype", "training", "seed", "loss", "label_smoothing"]
    steps: dict[str, Any] = {
        "max_steps": plan.max_steps,
        "epochs": 0.0 if plan.max_steps else plan.epochs,
        "learning_rate": plan.learning_rate,
        "lora_rank": plan.lora_rank,
    }
    weight = 1.0 if sft else s.lm_loss_weight
    inputs = {
        "feed": [feed["data"].rsplit("/", 1)[-1]] if sft else target.key,
        "weights": run.pivot.identity,
        "lm_loss_weight": weight,
        **steps,
        **{k: getattr(s, k) for k in fields},
    }
    # Where checkpoints are pushed to changes nothing in them.
    inputs["training"] = {k: v for k, v in s.training.items() if not k.startswith(("hub_", "push"))}
    name = "sft" if sft else target_name(sources)
    stage = run.work.stage(f"train/{name}", inputs)
    job = TrainJob(
        pivot=run.pivot.weights.absolute(),
        tokenizer=run.pivot.tokenizer_folder.absolute(),
        out=model_of(stage).absolute(),
        settings=s.model_copy(update={"training": pushed_as(plan, name)}),
        lm_loss_weight=weight,
        feed=feed,
        name=name,
        quiet=run.quiet,
        **steps,
    )
    return stage, job


def pushed_as(plan: FusionPlan, name: str) -> dict[str, Any]:
    """The settings' `training`; of several trainings each pushes to a repository of its own."""
    training = dict(plan.settings.training)
    apart = plan.settings.pairing == "pairwise" and len(plan.sources) > 1
    if training.get("push_to_hub") and (apart or plan.settings.sft_baseline):
        training["hub_model_id"] = f"{training['hub_model_id']}-{name}"
    return training


def train(run: Run, stage: Stage, job: TrainJob) -> Stage:
    """The trained target."""
    if not stage.finished:
        with stage.running() as results:
            trained = launch(job, run.settings.processes)
            history = json.loads((trained.folder / HISTORY).read_text(encoding="utf-8"))
            last = history["log"][-1] if history["log"] else {}
            results["steps"] = trained.steps
            results |= {k: last[k] for k in ("loss", "gold_loss", "fusion_loss") if k in last}
            results["bits_per_byte"] = trained.bits_per_byte
    return stage


def model_of(stage: Stage) -> Path:
    """The trained model of a training stage."""
    return stage.folder / "model"


def held_out_score(run: Run, data: Stage, model: LocalModel, *, keep: bool = True) -> Score:
    """Bits per byte of a model on the held-out conversations. keep: note it in the work folder."""
    inputs = {"data": data.key, "weights": model.identity, **model.reading}
    stage = run.work.stage(f"scores/{safe(model.name)}", inputs)
    if not stage.finished:
        with stage.running() as results:
            job = CollectJob(
                model=model.describe(),
                data=data.folder.absolute(),
                store=stage.folder.absolute() / "store",
                settings=run.settings.model_copy(update={"top_k": 1, "temperature": 1.0}),
                part="held_out",
            )
            total = int(data.results["held_out"])
            with run.progress(f"held-out score of {model.name}", total) as advance:
                collect_in(job, 1, advance)
            measured = score(Store(job.store), parts=True)
            assert measured is not None
            results["held_out"] = vars(measured)
    found = Score(**stage.results["held_out"])
    if not keep:
        stage.discard()
    return found
