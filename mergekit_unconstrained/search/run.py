"""A search in one process: candidates merged in memory, scored, told to the storage.

The studies of a search share model, examples and storage: the search itself, and the baselines,
each with the same number of candidates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optuna.storages import BaseStorage

from mergekit_unconstrained.errors import MissingExtraError, UnconstrainedError
from mergekit_unconstrained.evaluation.records import Scored, Split
from mergekit_unconstrained.evaluation.run import score_examples
from mergekit_unconstrained.evaluation.subject import Subject
from mergekit_unconstrained.evaluation.task import Task
from mergekit_unconstrained.search.genome import Gene, Values
from mergekit_unconstrained.search.memory import LiveMerge
from mergekit_unconstrained.search.objective import Objective, Outcome, Scores
from mergekit_unconstrained.search.samplers import (
    Sampler,
    grid,
    make_sampler,
    uniform,
)
from mergekit_unconstrained.search.settings import SearchSettings
from mergekit_unconstrained.search.space import SHARED, Space
from mergekit_unconstrained.search.study import Evaluate, Study

SEARCHED = "search"
LABELS = {
    SEARCHED: "searched",
    "uniform_grid": "uniform (grid)",
    "uniform_random": "uniform (random)",
    "random": "random",
}
"""Study -> what tables call its best candidate."""


@dataclass(frozen=True)
class Spaces:
    """What is searched, and its two uniform relatives.

    tied: one value of every parameter for all experts and layers; free: one for every expert.
    """

    searched: Space
    tied: Space
    free: Space

    def of(self, study: str) -> Space:
        """The space of a study."""
        if study == "uniform_grid":
            return self.tied
        return self.free if study == "uniform_random" else self.searched


class Searcher:
    """Scores candidates for every study of a search."""

    def __init__(
        self,
        settings: SearchSettings,
        spaces: Spaces,
        live: LiveMerge,
        subject: Subject,
        tasks: Sequence[Task],
    ) -> None:
        self.settings = settings
        self.spaces = spaces
        self.live = live
        self.subject = subject
        self.tasks = tasks
        self.objective = Objective(tasks, "search", settings.seed)

    @property
    def objectives(self) -> int:
        """1, or the number of tasks where the sampler keeps them apart."""
        return len(self.objective.tasks) if self.settings.sampler == "nsga2" else 1

    def study(self, name: str, storage: BaseStorage, job: str, budget: int) -> Study:
        """One of the studies, begun or found in the storage. budget: a grid is laid out for it."""
        s, genome = self.settings, self.spaces.of(name).genome
        if name == SEARCHED:
            return Study(storage, name, make_sampler(genome, s), job, self.objectives)
        if name == "uniform_grid":
            # A grid depends on its budget, so another budget is another study.
            draw = grid(genome, budget, s.seed)
            return Study(storage, f"{name} of {budget}", Sampler(genome, draw), job)
        return Study(storage, name, Sampler(genome, uniform(genome, s.seed)), job)

    def evaluate(self, name: str, advance: Callable[[int], Any] = lambda _: None) -> Evaluate:
        """How the candidates of a study are scored."""
        space = self.spaces.of(name)
        racing = self.settings.racing
        if name == SEARCHED and self.objectives > 1:
            racing = racing.model_copy(update={"enabled": False})  # no single best to compare with

        def evaluate(values: Values, best: Scores | None) -> Outcome:
            try:
                self.live.write(space.candidate(values))
                with self.subject.remembering():
                    return self.objective.score(self.subject, racing, best, advance)
            except MissingExtraError:
                raise
            except (
                UnconstrainedError,
                RuntimeError,
                ValueError,
                ArithmeticError,
                MemoryError,
            ) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                return Outcome(math.nan, failure=reason[:300])

        return evaluate

    # -- scores in full ---------------------------------------------------------------------------

    def write(self, study: str, values: Values) -> None:
        """Put a candidate into the live model."""
        self.live.write(self.spaces.of(study).candidate(values))

    def score_in_full(self, split: Split, tasks: Sequence[Task]) -> dict[str, list[Scored]]:
        """Every example of a split, in the tasks' own order, for the model as it is."""
        with self.subject.remembering():
            return {
                task.name: score_examples(self.subject, task, task.examples(split))
                for task in tasks
                if split in task.splits()
            }


def used_genes(space: Space, live: LiveMerge) -> set[str]:
    """The genes that some tensor depends on: one in which their expert differs from the base.

    Methods without a table resolve their slices inside mergekit: there every gene is moved once.
    """
    genes = {g.address: g.name for g in space.genome.genes}
    if not space.in_table:
        return {gene.name for gene in space.genome.genes if _moves(space, live, gene)}
    used: set[str] = set()
    parameters = {parameter for _, parameter, _, _ in genes}
    for one in live.held:
        role = one.planned.role
        group = None if role.layer is None else space.genome.group_of(role.layer)
        # As a table is looked up: the most exact word first, a layer's before that of all layers.
        words = (*role.keys, "") if role.layer is None else (*role.keys, "all", "")
        places = [(where, word) for word in words for where in (group, None)]
        owners = {who for model in one.changed for who in (model, "", SHARED)}
        for owner, parameter in itertools.product(owners, parameters):
            found = ((owner, parameter, *place) for place in places)
            address = next((a for a in found if a in genes), None)
            if address is not None:
                used.add(genes[address])
    return used


def _moves(space: Space, live: LiveMerge, gene: Gene) -> bool:
    """Whether a gene at its far end makes another model, from the start or from a second point.

    The second, because a parameter may mean nothing at the start: a density where the weight is 0.
    """
    genome = space.genome
    for point in (genome.start, genome.from_unit([0.7] * len(genome))):
        far = max(gene.low, gene.high, key=lambda end: abs(end - point[gene.name]))
        moved = {**point, gene.name: gene.rounded(far)}
        if live.differ(space.candidate(point), space.candidate(moved)):
            return True
    return False


def fixing_unused(space: Space, live: LiveMerge) -> Space:
    """The space without the genes that change nothing."""
    used = used_genes(space, live)
    return replace(space, genome=space.genome.fixing(lambda g: g.name not in used))
