"""The models of the homogeneous zoo: a tiny Llama and two experts of it, one skill each.

They read characters. All are trained in minutes on one thread, which at this size is several times
faster than two.
"""

from __future__ import annotations

import random
import shutil
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from mergekit_unconstrained.demo.stories_data import Stories, Story
from mergekit_unconstrained.demo.stories_tasks import share_right
from mergekit_unconstrained.demo.zoo_models import BATCH, train

END = "</s>"
LEARNT, LEARNT_FROM = 0.97, "development"
"""A model has learnt its own stories when it answers that share of those of this split."""
_HIDDEN = 128
LLAMA: Mapping[str, Any] = {
    "hidden_size": _HIDDEN,
    "intermediate_size": 344,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    # with transformers' usual 0.02 so narrow a model learns nothing
    "initializer_range": _HIDDEN**-0.5,
}


@dataclass(frozen=True)
class Recipe:
    """One model: `steps` of BATCH stories of `families` in `shares`, at the highest rate `rate`.

    rounds: as often, with the rate from its highest again, until the first family is LEARNT; so
    often at most. parent: the model whose weights it starts from.
    """

    name: str
    families: tuple[str, ...]
    shares: tuple[float, ...]
    steps: int
    rate: float
    parent: str | None = None
    rounds: int = 1


# the experts keep hearing plain stories, or they forget them
RECIPES = (
    Recipe("base", ("base_skill",), (1.0,), 1000, 2e-3, rounds=4),
    Recipe("expert_a", ("verb", "base_skill"), (0.7, 0.3), 250, 5e-4, parent="base", rounds=4),
    Recipe("expert_b", ("notation", "base_skill"), (0.7, 0.3), 250, 5e-4, parent="base", rounds=4),
)


def character_tokenizer() -> Any:
    """A fast tokenizer of transformers: every character of plain English text a token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = string.digits + string.ascii_lowercase + string.punctuation + " \n"
    names = (END, "<unk>", *characters)
    backend = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names[:2]])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=END,
        unk_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def make(
    recipe: Recipe,
    stories: Stories,
    folder: Path,
    advance: Callable[[int], Any] = lambda _: None,
) -> Path:
    """Train a model and write folder/NAME; one that is there already stays as it is.

    Its parent must be in the folder. advance: told how many more stories were read, of all that
    its rounds would take; at the end, those that it did not need too.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    out = folder / recipe.name
    if out.is_dir():
        advance(recipe.rounds * recipe.steps * BATCH)
        return out
    with torch.random.fork_rng():
        torch.manual_seed(stories.seed)
        if recipe.parent is None:
            tokenizer = character_tokenizer()
            end = tokenizer.eos_token_id
            ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
            config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), **ends, **LLAMA)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        else:
            parent = folder / recipe.parent
            tokenizer = AutoTokenizer.from_pretrained(parent)
            model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
        corpus = stories.corpus(recipe.families, recipe.shares, recipe.name)
        corpus = by_length(corpus, stories.seed)
        asked = stories.held_out[recipe.families[0]][LEARNT_FROM]
        for left in reversed(range(recipe.rounds)):
            train(model, tokenizer, _counted(corpus, advance), recipe.steps, recipe.rate)
            if left and share_right(model, tokenizer, asked) >= LEARNT:
                advance(left * recipe.steps * BATCH)
                break
    partial = folder / f"{recipe.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)
    return out


def by_length(stories: Iterator[Story], seed: int) -> Iterator[Story]:
    """The same stories, those of like length in one batch: a quarter less padding."""
    draw = random.Random(f"batches {seed}")
    while True:
        drawn = sorted(islice(stories, 16 * BATCH), key=lambda s: len(s.prompt + s.response))
        batches = [drawn[i : i + BATCH] for i in range(0, len(drawn), BATCH)]
        draw.shuffle(batches)
        yield from chain(*batches)


def _counted(stories: Iterator[Any], advance: Callable[[int], Any]) -> Iterator[Any]:
    for story in stories:
        advance(1)
        yield story
