"""What a fusion will take: tokens, steps, time on this machine, disk and memory."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from mergekit_unconstrained.fusion.plan import FusionPlan, Member
from mergekit_unconstrained.fusion.preview import BYTES_PER_TOKEN, Preview
from mergekit_unconstrained.fusion.training.arguments import batch_shape

_ROW = 150
"""Bytes of a line of the data stage beside its text."""


@dataclass(frozen=True)
class Estimate:
    """Figures for `plan`.

    seconds: by stage, of arithmetic alone. disk: bytes. memory: bytes of weights and optimiser in
    training. logits: bytes of the pivot's logits and their gradient in one pass, in float32, if
    every response is as long as may be; what the loss makes of them, chunk by chunk, is small
    beside that. parameters: by model.
    """

    rows: int
    tokens: int
    steps: int
    seconds: dict[str, float]
    disk: int
    memory: int
    logits: int
    parameters: dict[str, int]
    licences: dict[str, str | None]


def estimate(plan: FusionPlan, data: Preview) -> Estimate:
    """Estimate a plan from its headers, a look at its data and one multiplication of matrices.

    A forward pass costs 2 operations per parameter and token, a training step 6.
    """
    return costs(plan, data.conversations, data.tokens, data.text)


def costs(plan: FusionPlan, rows: int, tokens: int, text: int | None = None) -> Estimate:
    """The estimate for data of so many conversations and tokens, whether they are there or not.

    text: bytes of the conversations; None: as many as the tokens usually stand for.
    """
    text = int(tokens * BYTES_PER_TOKEN) if text is None else text
    s = plan.settings
    parameters = {m.name: _parameters(m) for m in plan.members}
    speed = flops_per_second()
    trainings = 1 if s.pairing == "joint" else len(plan.sources)
    per_epoch = max(1, math.ceil(rows * (1 - s.eval_share) / s.batch_size))
    steps = plan.max_steps or math.ceil(plan.epochs * per_epoch)
    trained = steps * s.batch_size * (tokens / max(rows, 1))
    pivot = parameters[plan.pivot.name]
    seconds = {
        f"distributions of {m.name}": 2 * parameters[m.name] * tokens / speed for m in plan.members
    }
    count = trainings + s.sft_baseline
    seconds[f"training, {count} time{'s' if count > 1 else ''}"] = (
        6 * pivot * trained / speed * count
    )
    memory = pivot * (4 + 12 * (0.02 if plan.lora_rank else 1.0))
    return Estimate(
        rows=rows,
        tokens=tokens,
        steps=steps,
        seconds=seconds,
        disk=disk_needed(plan, rows, tokens, text),
        memory=int(memory),
        logits=2 * 4 * math.prod(logits_shape(plan)),
        parameters=parameters,
        licences={m.name: licence_of(m) for m in plan.members},
    )


def disk_needed(plan: FusionPlan, rows: int, tokens: int, text: int) -> int:
    """Bytes that the work folder will hold at its fullest, with two checkpoints of one training."""
    s = plan.settings
    pivot = _parameters(plan.pivot)
    trainings = (1 if s.pairing == "joint" else len(plan.sources)) + s.sft_baseline
    stored = rows * _ROW + text + tokens * 3.5 * s.top_k * len(plan.members)
    return int(stored + pivot * (2 * trainings + (0 if plan.lora_rank else 24)))


def logits_shape(plan: FusionPlan) -> tuple[int, int, int]:
    """Conversations in a pass, positions of each, words of the pivot (0: not known)."""
    config = plan.pivot.parent.config
    words = getattr(config, "vocab_size", None) or getattr(
        getattr(config, "text_config", None), "vocab_size", 0
    )
    device, _ = batch_shape(plan.settings, plan.settings.processes)
    return device, plan.settings.max_length, int(words or 0)


def _parameters(member: Member) -> int:
    headers = (member.parent.tensors or {}).values()
    return sum(math.prod(h.shape) for h in headers)


def flops_per_second() -> float:
    """Of a multiplication of float32 matrices here, the best of three."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(1024, 1024, device=device)
    best = math.inf
    for _ in range(3):
        started = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best


def licence_of(member: Member) -> str | None:
    """The licence that a model's own card declares, None where it has none here."""
    folder = member.parent.folder
    card = folder / "README.md" if folder is not None else None
    if card is None or not card.exists():
        return None
    from huggingface_hub import ModelCard

    try:
        declared = ModelCard.load(card).data.license
    except Exception:  # a card that cannot be read: not known
        return None
    return str(declared) if declared else None
