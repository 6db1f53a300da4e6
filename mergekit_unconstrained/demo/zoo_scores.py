"""What a model of any tokenizer knows of a family's odds.

python -m mergekit_unconstrained.demo.zoo_scores zoo/llama_a mixture
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from mergekit_unconstrained.demo.zoo import COMMON, LETTERS, ODDS, Story, Zoo
from mergekit_unconstrained.demo.zoo_models import IGNORED, batch_of, read, text_of

BEST = sum(odds * math.log(odds) for odds in ODDS)
"""The expected log-likelihood of who knows the odds, in nats."""


@dataclass(frozen=True)
class Score:
    """mean and its standard error over n stories."""

    mean: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        n = len(values)
        mean = math.fsum(values) / n
        spread = math.fsum((value - mean) ** 2 for value in values) / max(n - 1, 1)
        return cls(mean, math.sqrt(spread / n), n)


@torch.no_grad()
def log_probability(model: Any, tokenizer: Any, stories: list[Story]) -> torch.Tensor:
    """[n] log p(response and its end | instruction) in nats."""
    ids, labels = batch_of(tokenizer, stories)
    chances = read(model, ids).float().log_softmax(-1)
    gold = labels[:, 1:]
    found = chances.gather(-1, gold.clamp_min(0)[..., None])[..., 0]
    return (found * (gold != IGNORED)).sum(1).double()


def outcome_log_probabilities(model: Any, tokenizer: Any, zoo: Zoo, family: str) -> torch.Tensor:
    """[facts, letters] log-probability of each letter as the outcome of each verb and letter.

    Of the whole response, so that it is the same thing for every tokenizer.
    """
    stories = zoo.singles(family)
    every = [replace(story, outcomes=(letter,)) for story in stories for letter in LETTERS]
    return log_probability(model, tokenizer, every).view(len(stories), len(LETTERS))


def fact_likelihoods(model: Any, tokenizer: Any, zoo: Zoo, family: str) -> list[float]:
    """For each verb and letter the expected log-likelihood of a response drawn by the odds, in
    nats; at best -entropy(ODDS) = -1.03."""
    chances = outcome_log_probabilities(model, tokenizer, zoo, family)
    return [
        sum(
            odds * row[LETTERS.index(outcome)].item()
            for odds, outcome in zip(ODDS, zoo.outcomes[story.verbs[0], story.letter], strict=True)
        )
        for story, row in zip(zoo.singles(family), chances, strict=True)
    ]


def log_likelihood(model: Any, tokenizer: Any, zoo: Zoo, family: str) -> Score:
    """The mean of `fact_likelihoods`."""
    return Score.of(fact_likelihoods(model, tokenizer, zoo, family))


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, stories: Sequence[Story]) -> Score:
    """Share of greedy responses that are the story of likeliest outcomes, to the letter."""
    hits = [0.0] * len(stories)
    prompts = [tokenizer(text_of(s)[0], add_special_tokens=False)["input_ids"] for s in stories]
    for length in sorted({len(ids) for ids in prompts}):  # no padding within a batch
        rows = [i for i, ids in enumerate(prompts) if len(ids) == length]
        output = model.generate(
            input_ids=torch.tensor([prompts[i] for i in rows]),
            attention_mask=torch.ones(len(rows), length, dtype=torch.long),
            max_new_tokens=min(28, 64 - length),
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for i, ids in zip(rows, output, strict=True):
            prompt, response = text_of(stories[i])
            said = tokenizer.decode(ids, skip_special_tokens=True)
            hits[i] = float(said == prompt + response)
    return Score.of(hits)


def pairs_of(zoo: Zoo) -> list[tuple[str, str]]:
    """Different families in both orders, without the common one: what needs two parents."""
    return list(itertools.permutations([f for f in zoo.families if f != COMMON], 2))


def scores_of(folder: Path, zoo: Zoo, composed: int = 20) -> dict[str, tuple[Score, Score | None]]:
    """Family -> exact match and log-likelihood of a model; `composed`: of stories of two families.

    composed: so many stories of each of `pairs_of`, of which there is no log-likelihood.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found: dict[str, tuple[Score, Score | None]] = {
        family: (
            exact_match(model, tokenizer, zoo.singles(family)),
            log_likelihood(model, tokenizer, zoo, family),
        )
        for family in zoo.families
    }
    stories = [s for pair in pairs_of(zoo) for s in zoo.doubles(*pair, composed)]
    return found | ({"composed": (exact_match(model, tokenizer, stories), None)} if stories else {})


@click.command(
    help="Score models of the zoo, or made of them: for each family the share of greedy answers "
    "that are the likeliest outcome, and the KL divergence from the true odds in nats."
)
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(folders: tuple[Path, ...]) -> None:
    torch.set_num_threads(1)  # faster at this size
    for folder in folders:
        click.echo(str(folder))
        for family, (exact, likelihood) in scores_of(folder, Zoo()).items():
            line = f"  {family:10} {exact.mean:.3f} ± {exact.error:.3f} (n = {exact.n})"
            if likelihood is not None:
                line += f"  {BEST - likelihood.mean:6.3f} ± {likelihood.error:.3f} nats"
            click.echo(line)


if __name__ == "__main__":
    main()
