"""Search, development and test data kept apart; what must not be optimised on."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from mergekit_unconstrained.errors import DataError, RecipeError
from mergekit_unconstrained.evaluation.records import Example, Split
from mergekit_unconstrained.evaluation.task import Task

if TYPE_CHECKING:
    from mergekit_unconstrained.evaluation.configured import ConfiguredTask

BENCHMARKS = (
    *("agieval", "aime", "alpacaeval", "arc", "asdiv", "bbh", "boolq", "commonsenseqa", "copa"),
    *("drop", "gpqa", "gsm8k", "gsm_hard", "hellaswag", "humaneval", "ifeval", "lambada"),
    *("livecodebench", "logiqa", "math", "math500", "mawps", "mbpp", "mgsm", "mmlu", "mmlu_pro"),
    *("mt_bench", "musr", "naturalquestions", "openbookqa", "piqa", "race", "sciq", "siqa"),
    *("squad", "svamp", "triviaqa", "truthfulqa", "wikitext", "winogrande", "xcopa", "xnli"),
)
"""Names of published benchmarks, as they stand in file names."""
_PLAIN_WORDS = ("arc", "drop", "math", "race")
"""Benchmarks whose names are words: only with the word `test` in the file's own name."""


def question_digest(example: Example) -> str:
    """Of what an example asks, case and white space apart: its messages without the system's, and
    its choices."""
    asked = [[m.role, _plain(m.content)] for m in example.messages if m.role != "system"]
    text = json.dumps([asked, [_plain(c) for c in example.choices]], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_disjoint(tasks: Sequence[Task]) -> None:
    """DataError when a question stands in two splits, of one task or of two."""
    seen: dict[str, tuple[str, Split, int]] = {}
    first: tuple[str, Example] | None = None
    count = 0
    for task in tasks:
        for split in task.splits():
            for number, example in enumerate(task.examples(split)):
                digest = question_digest(example)
                name, other, at = seen.setdefault(digest, (task.name, split, number))
                if other == split:
                    continue
                count += 1
                if first is None:
                    where = (
                        f"example {number} of the {split} split of task {task.name!r} is also "
                        f"example {at} of the {other} split of task {name!r}"
                    )
                    first = where, example
    if first is not None:
        where, example = first
        asked = _plain(example.messages[-1].content if example.messages else "")
        raise DataError(
            f"{where} ({count} such in all): {asked[:80]!r}; a split tells nothing about questions "
            "of another, so take them out of one"
        )


def fitness_refused(task: ConfiguredTask) -> None:
    """RecipeError when a search would optimise on a published benchmark's test split."""
    if task.settings.allow_test_split or "search" not in task.splits():
        return
    name = task.benchmark("search")
    if name is not None:
        raise RecipeError(
            f"the search split of task {task.name!r} looks like the test split of {name}: a score "
            "that was optimised on it says nothing; search on its train split, or set "
            "`allow_test_split: true` and say so where you publish"
        )


def benchmark_named(file: str) -> str | None:
    """The published benchmark whose test split a file's path names; None when it names none.

    `gsm8k/test.jsonl`, `humaneval_test.jsonl`. A name cannot prove anything; it catches mistakes.
    """
    path = PurePath(file.casefold())
    own = _words(path.stem)
    if "test" not in own:
        return None
    words = own | {word for part in path.parent.parts[-3:] for word in _words(part)}
    for name in BENCHMARKS:
        if name in words and (name not in _PLAIN_WORDS or name in own):
            return name
    return None


def _words(part: str) -> set[str]:
    """The words of a file's name, neighbours joined too: mmlu-pro is mmlu, pro and mmlu_pro."""
    words = [word for word in re.split(r"[^a-z0-9]+", part) if word]
    pairs = [mark.join(two) for two in itertools.pairwise(words) for mark in ("", "_")]
    return {*words, *pairs}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
