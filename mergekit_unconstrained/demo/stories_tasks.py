"""The task files of the homogeneous zoo, and what its models make of them.

data/FAMILY.SPLIT.jsonl   columns prompt, target (the answer) and response (the working, too)
tasks.yml                 FAMILY: the answer behind the mark, right or wrong
                          FAMILY_nats: how likely the whole response is
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from mergekit_unconstrained.demo.stories_data import FAMILIES, MARK, Stories, Story

DATA = "data"
TASKS = "tasks.yml"
LONGEST = 40  # tokens of a response; none needs more than 25 and its end

_HEADER = """\
# Tasks of the stories of seed {seed}, for `mergekit-unconstrained evaluate` and a search's `tasks`.
# No question is in two splits or in anybody's training data; numbers are written last digit first.
"""


def row_of(story: Story) -> dict[str, str]:
    """One line of a task file."""
    return {"prompt": story.prompt, "target": story.answer, "response": story.response}


def tasks_of(stories: Stories) -> dict[str, dict[str, Any]]:
    """The tasks as tasks.yml has them."""
    found: dict[str, dict[str, Any]] = {}
    for family in FAMILIES:
        data = {split: f"{DATA}/{family}.{split}.jsonl" for split, _ in stories.sizes}
        found[family] = {
            "kind": "exact",
            "data": data,
            "prompt": "prompt",
            "target": "target",
            "pattern": f"{MARK}([0-9]+)$",
            "max_new_tokens": LONGEST,
            "stop": ["\n"],
        }
        found[f"{family}_nats"] = {
            "kind": "likelihood",
            "data": data,
            "prompt": "prompt",
            "target": "response",
        }
    return found


def write_tasks(stories: Stories, folder: Path) -> Path:
    """Write folder/data and folder/tasks.yml; ones that are there already stay as they are."""
    partial, data, tasks = folder / f"{DATA}.partial", folder / DATA, folder / TASKS
    if not data.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for family, splits in stories.held_out.items():
            for split, questions in splits.items():
                lines = "".join(json.dumps(row_of(story)) + "\n" for story in questions)
                (partial / f"{family}.{split}.jsonl").write_text(lines, encoding="utf-8")
        partial.rename(data)
    if not tasks.is_file():
        text = yaml.safe_dump({"tasks": tasks_of(stories)}, sort_keys=False)
        beside = folder / f"{TASKS}.partial"
        beside.write_text(_HEADER.format(seed=stories.seed) + text, encoding="utf-8")
        beside.rename(tasks)
    return tasks


@torch.inference_mode()
def responses(
    model: Any, tokenizer: Any, stories: Sequence[Story], at_once: int = 150
) -> list[str]:
    """Greedy responses of at most LONGEST tokens."""
    found: list[str] = []
    left = iter(stories)
    while batch := list(islice(left, at_once)):
        prompts = [story.prompt for story in batch]
        read = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        made = model.generate(
            input_ids=read["input_ids"],
            attention_mask=read["attention_mask"],
            max_new_tokens=LONGEST,
            do_sample=False,
        )
        said = made[:, read["input_ids"].shape[1] :]
        found += tokenizer.batch_decode(said, skip_special_tokens=True)
    return found


def is_right(story: Story, response: str) -> bool:
    """As the pattern of the task has it: the answer stands behind the mark, at the end."""
    return response.endswith(MARK + story.answer)


def share_right(model: Any, tokenizer: Any, asked: Sequence[Story]) -> float:
    """The share of some questions that a model answers right."""
    said = responses(model, tokenizer, asked)
    return sum(map(is_right, asked, said)) / len(asked)


def scores_of(
    folder: Path, stories: Stories, split: str, advance: Callable[[int], Any] = lambda _: None
) -> dict[str, float]:
    """Family -> share of its questions that a model answers right."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {}
    for family, splits in stories.held_out.items():
        asked = splits[split]
        found[family] = share_right(model, tokenizer, asked)
        advance(len(asked))
    return found
