"""The zoo's models: a tiny Llama, two experts of it, a Qwen2 and a GPT-2, trained in minutes.

Each knows the odds of the verbs of its own family and of the common ones (zoo.py), and has a
tokenizer of its own kind; the two experts share their base's. Everything is drawn from seeds.

    python -m mergekit_unconstrained.demo.zoo_models zoo
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import click
import torch

from mergekit_unconstrained.demo.zoo import COMMON, Story, Zoo
from mergekit_unconstrained.demo.zoo_tokenizers import Kind, train_tokenizer

BATCH = 64
IGNORED = -100  # label of tokens that the loss leaves out
DATA = "stories.jsonl"

_HIDDEN = 128
_LLAMA: Mapping[str, Any] = {
    "hidden_size": _HIDDEN,
    "intermediate_size": 4 * _HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    # transformers' usual 0.02 is far too little for so narrow a model: it learns nothing
    "initializer_range": _HIDDEN**-0.5,
}
_GPT2: Mapping[str, Any] = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 64**-0.5,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_QWEN2: Mapping[str, Any] = {
    **_LLAMA,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_key_value_heads": 2,
    "initializer_range": 64**-0.5,
}
CARD = """---
license: apache-2.0
language: en
---

# {name}

A toy model of recipes/zoo/mix.yml: mergekit_unconstrained/demo/zoo.py tells what it knows.
"""


@dataclass(frozen=True)
class Species:
    """One model of the zoo.

    family: whose odds it knows beside the common ones. parent: the species whose weights and
    tokenizer it starts from. kind, merges: of its tokenizer. steps of BATCH stories at the highest
    learning rate `rate`.
    """

    name: str
    architecture: str
    steps: int
    rate: float
    family: str | None = None
    parent: str | None = None
    kind: Kind = "bytes"
    merges: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def known(self) -> tuple[str, ...]:
        """The families whose odds it learns."""
        return (COMMON,) if self.family is None else (COMMON, self.family)


SPECIES = (
    Species("llama_base", "llama", 600, 2e-3, kind="sentencepiece", merges=120, settings=_LLAMA),
    Species("llama_a", "llama", 500, 1e-3, family="llama_a", parent="llama_base"),
    Species("llama_b", "llama", 500, 1e-3, family="llama_b", parent="llama_base"),
    Species("qwen2", "qwen2", 900, 4e-3, family="qwen2", merges=40, settings=_QWEN2),
    Species("gpt2", "gpt2", 900, 4e-3, family="gpt2", merges=90, settings=_GPT2),
)


def text_of(story: Story) -> tuple[str, str]:
    """Prompt and response of a model without a chat template: a line each."""
    return story.instruction + "\n", story.response


def batch_of(tokenizer: Any, stories: list[Story]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [b, n] padded at the right, and labels [b, n]: the response and its end, else IGNORED."""
    pairs = [text_of(story) for story in stories]
    made = tokenizer(
        ["".join(pair) + tokenizer.eos_token for pair in pairs],
        add_special_tokens=False,
        return_offsets_mapping=True,
        padding=True,
        return_tensors="pt",
    )
    ids, starts = made["input_ids"], made["offset_mapping"][..., 0]
    first = torch.tensor([len(prompt) for prompt, _ in pairs])[:, None]
    answered = (starts >= first) & made["attention_mask"].bool()
    return ids, ids.masked_fill(~answered, IGNORED)


def read(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[b, n - 1, V] logits for ids[:, 1:]. No mask: padding comes last, where nothing sees it."""
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[:, :-1]


def train(model: Any, tokenizer: Any, stories: Iterator[Story], steps: int, rate: float) -> None:
    """Plain AdamW with a cosine schedule, loss on responses alone."""
    warmup = min(50, 1 + steps // 4)
    optimiser = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda i: min(1, (i + 1) / warmup) * (1 + math.cos(math.pi * i / steps)) / 2,
    )
    for _ in range(steps):
        ids, labels = batch_of(tokenizer, list(islice(stories, BATCH)))
        logits = read(model, ids)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()


def make(species: Species, zoo: Zoo, folder: Path) -> Path:
    """Train a species and write folder/NAME; one that is there already stays as it is.

    Its parent must be in the folder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    out = folder / species.name
    if (out / "config.json").is_file():
        return out
    with _alone(zoo.seed):
        if species.parent is None:
            texts = ["\n".join(text_of(s)) for s in islice(zoo.corpus((COMMON,), "words"), 4000)]
            tokenizer = train_tokenizer(species.kind, texts, species.merges)
            end = tokenizer.eos_token_id
            ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
            config = AutoConfig.for_model(
                species.architecture, vocab_size=len(tokenizer), **ends, **species.settings
            )
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder / species.parent)
            model = AutoModelForCausalLM.from_pretrained(
                folder / species.parent, dtype=torch.float32
            )
        stories = zoo.corpus(species.known, species.name)
        train(model, tokenizer, stories, species.steps, species.rate)
    partial = folder / f"{species.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(CARD.format(name=species.name), encoding="utf-8")
    partial.rename(out)
    return out


def write_stories(stories: list[Story], path: Path) -> Path:
    """The stories as JSONL with the columns instruction and response."""
    lines = [json.dumps({"instruction": s.instruction, "response": s.response}) for s in stories]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@contextmanager
def _alone(seed: int) -> Iterator[None]:
    """One thread, which is faster at this size, and random numbers of our own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


@click.command(help="Make the zoo's models and data in FOLDER (some four minutes).")
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    zoo = Zoo()
    write_stories(zoo.shown(zoo.families), folder / DATA)
    for species in SPECIES:
        click.echo(make(species, zoo, folder))


if __name__ == "__main__":
    main()
