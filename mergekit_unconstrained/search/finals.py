"""What follows the search: finalists on the development split, the winners on the test split."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_unconstrained.engine.files import replacing
from mergekit_unconstrained.errors import UnconstrainedError
from mergekit_unconstrained.evaluation.records import Scored
from mergekit_unconstrained.search.genome import Values
from mergekit_unconstrained.search.objective import Objective
from mergekit_unconstrained.search.run import LABELS, SEARCHED, Searcher
from mergekit_unconstrained.search.samplers import centre
from mergekit_unconstrained.search.study import Study, ranked

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], Any]]]
"""progress(what, total) gives a function that is told how many more were done."""


class Kept:
    """Results by key in one JSON file, computed once; those of another job are dropped."""

    def __init__(self, path: Path, job: str) -> None:
        self._path = path
        self._job = job
        self._found: dict[str, Any] = {}
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["job"] == job:
                self._found = content["found"]

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """What is kept under a key, computed and written first where it is not there."""
        if key not in self._found:
            self._found[key] = compute()
            with replacing(self._path) as stream:
                text = json.dumps({"job": self._job, "found": self._found})
                stream.write(text.encode())
        return self._found[key]


@dataclass(frozen=True)
class Chosen:
    """The candidate of a study that won on the development split.

    value: on the search split, None for the centre of the distribution, which was not scored there.
    development: None where no task has such a split; then the search value chose.
    """

    study: str
    values: dict[str, float]
    value: float | None
    development: float | None


def choose(
    searcher: Searcher, studies: Mapping[str, Study], cache: Kept, progress: Progress
) -> dict[str, Chosen]:
    """Score every study's best candidates in full on the development split, and take the best."""
    settings = searcher.settings
    held = any("development" in t.splits() and t.weight > 0 for t in searcher.tasks)
    objective = Objective(searcher.tasks, "development", settings.seed) if held else None
    chosen = {}
    for name, study in studies.items():
        entrants: list[tuple[dict[str, float], float | None]] = [
            (f.values, f.value) for f in ranked(study.finished, settings.finalists)
        ]
        if not entrants:
            raise UnconstrainedError(f"no candidate of {LABELS[name]} was scored in full")
        if name == SEARCHED and settings.sampler == "cma":
            genome = searcher.spaces.searched.genome
            entrants.append((centre(genome, settings, study.raw_trials), None))
        if objective is None:
            values, value = entrants[0]
            chosen[name] = Chosen(name, values, value, None)
            continue
        scored: list[tuple[float, Chosen]] = []
        with progress(f"finalists: {LABELS[name]}", len(entrants)) as advance:
            for values, value in entrants:
                key = json.dumps([name, values], sort_keys=True)

                def score(values: Values = values, name: str = name) -> float:
                    searcher.write(name, values)
                    found = searcher.score_in_full("development", objective.tasks)
                    return objective.value(
                        {task: [one.value for one in scores] for task, scores in found.items()}
                    )

                found = float(cache.get(key, score))
                scored.append((found, Chosen(name, values, value, found)))
                advance(1)
        chosen[name] = max(scored, key=lambda pair: pair[0])[1]
    return chosen


Tested = dict[str, dict[str, list[Scored]]]
"""Model -> task -> the scores of its test examples.

A parent is `base NAME` or `expert NAME`; candidates have LABELS, so that no two can be mixed up.
"""


def test(
    searcher: Searcher, chosen: Mapping[str, Chosen], cache: Kept, progress: Progress
) -> Tested:
    """Every parent and every chosen candidate on the test split, once."""
    if not any("test" in t.splits() for t in searcher.tasks):
        return {}
    found: Tested = {}
    plan = searcher.live.plan
    parents = [plan.base, *plan.experts]
    with progress("the test split", len(parents) + len(chosen)) as advance:
        for parent in parents:
            label = f"{'base' if parent is plan.base else 'expert'} {parent.name}"
            found[label] = _tested(
                cache, label, searcher, functools.partial(searcher.live.write_parent, parent.name)
            )
            advance(1)
        for name, one in chosen.items():
            key = json.dumps([name, one.values], sort_keys=True)
            found[LABELS[name]] = _tested(
                cache, key, searcher, functools.partial(searcher.write, name, one.values)
            )
            advance(1)
    return found


def _tested(
    cache: Kept, key: str, searcher: Searcher, write: Callable[[], Any]
) -> dict[str, list[Scored]]:
    def score() -> dict[str, list[dict[str, Any]]]:
        write()
        found = searcher.score_in_full("test", searcher.tasks)
        return {task: [asdict(one) for one in scores] for task, scores in found.items()}

    return {t: [Scored(**one) for one in scores] for t, scores in cache.get(key, score).items()}
