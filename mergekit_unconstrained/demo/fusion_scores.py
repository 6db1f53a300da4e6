"""Scores of a model of any tokenizer on the fusion demo's problems."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergekit_unconstrained.demo.reasoning import SKILLS, Problem
from mergekit_unconstrained.fusion.distributions.collect import Collected, collect, header_for
from mergekit_unconstrained.fusion.distributions.store import Store
from mergekit_unconstrained.fusion.models import LocalModel, identity_of
from mergekit_unconstrained.fusion.records import Conversation, Turn
from mergekit_unconstrained.fusion.settings import FusionSettings

MAX_LENGTH = 256
MAX_NEW_TOKENS = 112  # the longest solution has 100
_SETTINGS = FusionSettings(
    top_k=1, max_length=MAX_LENGTH, collect_tokens=2048, collect_dtype="float32"
)

Results = dict[str, dict[str, float]]
"""By problem ("legs 3"): bits and bytes of the worked solution; right (0 or 1) where asked."""
Asked = Sequence[tuple[str, Problem]]


@dataclass(frozen=True)
class Ratio:
    """A mean and its standard error over n problems."""

    mean: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float], sizes: Sequence[float]) -> Ratio:
        """sum(values) / sum(sizes); its error is that of a ratio of means (scores.py)."""
        n, whole = len(values), math.fsum(sizes)
        mean = math.fsum(values) / whole
        spread = math.fsum((v - mean * s) ** 2 for v, s in zip(values, sizes, strict=True))
        error = math.sqrt(spread * n / (n - 1)) / whole if n > 1 else math.nan
        return cls(mean, error, n)


def bits_per_byte(found: Results, less: Results | None = None) -> Ratio:
    """Bits per byte of the solutions; less: the difference from another model's, pairwise."""
    bits = [one["bits"] - (less[name]["bits"] if less else 0.0) for name, one in found.items()]
    return Ratio.of(bits, [one["bytes"] for one in found.values()])


def exact_match(found: Results) -> Ratio:
    """Share of right answers among the problems that were asked."""
    right = [one["right"] for one in found.values() if "right" in one]
    return Ratio.of(right, [1.0] * len(right))


def read_as(folder: Path, name: str, tokenizer: Path | None = None) -> LocalModel:
    """A model folder. tokenizer: a folder whose tokenizer it is read with, if not its own."""
    files = [f for f in folder.iterdir() if f.suffix == ".safetensors"]
    return LocalModel(name, folder, tokenizer or folder, identity_of(files), MAX_LENGTH)


def score(
    model: LocalModel,
    asked: Asked,
    answered: int,
    done: Callable[[int], object] = lambda _: None,
) -> Results:
    """Bits per byte of every solution; are greedy answers to `answered` of each skill right?

    Read as the fusion reads them: under the model's chat template, plain text where it has none.
    done: told, in sum, len(asked) and the number that were answered.
    """
    conversations = [
        Conversation(i, (Turn("user", p.instruction), Turn("assistant", p.response)))
        for i, (_, p) in enumerate(asked)
    ]
    names = [f"{skill} {i}" for i, (skill, _) in enumerate(asked)]
    found = dict(zip(names, likelihoods(model, conversations, done), strict=True))
    of_skill: dict[str, list[int]] = {}
    for i, (skill, _) in enumerate(asked):
        of_skill.setdefault(skill, []).append(i)
    chosen = [i for places in of_skill.values() for i in places[:answered]]
    if chosen:  # all in one batch: small models wait for their weights, not for arithmetic
        said = answers(model, [conversations[i] for i in chosen])
        for i, text in zip(chosen, said, strict=True):
            skill, problem = asked[i]
            found[names[i]]["right"] = float(SKILLS[skill].is_right(problem, text))
        done(len(chosen))
    return found


def likelihoods(
    model: LocalModel,
    conversations: Sequence[Conversation],
    done: Callable[[int], object] = lambda _: None,
) -> Iterable[dict[str, float]]:
    """Bits of each response with its end, and its bytes."""
    seen = 0

    def progress(now: Collected) -> None:
        nonlocal seen
        done(now.conversations - seen)
        seen = now.conversations

    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), header_for(model.identity, model.encoder, _SETTINGS))
        collect(
            model.weights,
            conversations,
            model.encoder,
            store,
            _SETTINGS,
            name=model.name,
            progress=progress,
        )
        records = store.read([c.row for c in conversations])
    return [
        {"bits": float(r.nats) / math.log(2), "bytes": float(r.ends[-1] - r.starts[0])}
        for r in records
    ]


@torch.inference_mode()
def answers(
    model: LocalModel,
    conversations: Sequence[Conversation],
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Greedy responses, in one batch, to what comes before each conversation's response."""
    from transformers import AutoModelForCausalLM

    encoded = model.encoder.encode_many(conversations)
    prompts = [e.ids[: int(e.positions[0])].tolist() for e in encoded]
    ends = sorted(model.encoder.end_ids)
    network: Any = AutoModelForCausalLM.from_pretrained(model.weights, dtype=torch.float32).eval()
    length = max(map(len, prompts))
    # padding comes first: new tokens must follow the prompt directly
    ids = [[ends[0]] * (length - len(one)) + one for one in prompts]
    mask = [[0] * (length - len(one)) + [1] * len(one) for one in prompts]
    output = network.generate(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    said: list[str] = model.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
    return said


def by_skill(found: Results) -> Mapping[str, Results]:
    """The results of each skill for itself."""
    parts: dict[str, Results] = {}
    for name, one in found.items():
        parts.setdefault(name.split()[0], {})[name] = one
    return parts
