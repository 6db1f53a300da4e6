"""How candidates are drawn: each is a pure function of the seed, its index and what is finished.

So a search that was killed goes on as if it had not been, and nothing of a sampler needs to be
stored. Indices count the trials that were not abandoned; in one process they are the order of
evaluation.

CMA-ES: Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772, in the implementation of
the package `cmaes`; its diagonal variant: Ros and Hansen, PPSN 2008. The paper (arXiv 2410.13699)
names CMA-ES; population, first step and start follow public practice, restarts with a doubled
population are those of Auger and Hansen (CEC 2005).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from cmaes import CMA, SepCMA
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from mergekit_unconstrained.search.genome import Genome
from mergekit_unconstrained.search.settings import SearchSettings

VALUE = "value"
"""User attribute: the score by which a trial is ranked, estimated where it was dropped early."""
FAILURE = "failure"
"""User attribute of failed trials: why. One without a reason was abandoned: its process died."""

Draw = Callable[[optuna.Study, FrozenTrial, int], Mapping[str, float]]
"""(study, trial, its index) -> values by gene."""


def counted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that were not abandoned, by number; the index of each is its place here."""
    kept = [t for t in trials if t.state != TrialState.FAIL or FAILURE in t.user_attrs]
    return sorted(kept, key=lambda t: t.number)


def distributions(genome: Genome) -> dict[str, BaseDistribution]:
    """The genome as Optuna stores it."""
    return {g.name: FloatDistribution(g.low, g.high) for g in genome.genes}


class Sampler(BaseSampler):
    """A rule for drawing candidates, as Optuna asks for them."""

    def __init__(self, genome: Genome, draw: Draw) -> None:
        self.space = distributions(genome)
        self._draw = draw

    def infer_relative_search_space(
        self,
        study: optuna.Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
    ) -> dict[str, BaseDistribution]:
        """The whole genome, always."""
        return self.space

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],  # noqa: ARG002
    ) -> dict[str, Any]:
        """One candidate."""
        others = counted(study.get_trials(deepcopy=False))
        index = sum(t.number < trial.number for t in others)
        return dict(self._draw(study, trial, index))

    def sample_independent(
        self,
        study: optuna.Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
        param_name: str,
        param_distribution: BaseDistribution,  # noqa: ARG002
    ) -> Any:
        """Never asked for: the whole genome is drawn together."""
        raise AssertionError(f"{param_name} is not part of the genome")


def make_sampler(genome: Genome, settings: SearchSettings) -> Sampler:
    """The sampler that the settings name."""
    if settings.sampler == "cma":
        return Sampler(genome, cma(genome, settings))
    if settings.sampler == "grid":
        return Sampler(genome, grid(genome, settings.budget, settings.seed))
    if settings.sampler == "random":
        return Sampler(genome, uniform(genome, settings.seed))
    return Sampler(genome, of_optuna(genome, settings))


def seed_of(seed: int, index: int) -> int:
    """The seed of one candidate."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])


def uniform(genome: Genome, seed: int) -> Draw:
    """Every gene uniform between its bounds; the start first."""

    def draw(_: optuna.Study, __: FrozenTrial, index: int) -> Mapping[str, float]:
        if index == 0:
            return genome.start
        return genome.from_unit(np.random.default_rng(seed_of(seed, index)).random(len(genome)))

    return draw


def grid(genome: Genome, budget: int, seed: int) -> Draw:
    """As many evenly spaced values of every gene as the budget allows, then uniform ones."""
    points = grid_points(genome, budget)
    axes = itertools.product(np.linspace(0, 1, points), repeat=len(genome))
    cells = [genome.from_unit(x) for x in itertools.islice(axes, budget)] if points > 1 else []
    rest = uniform(genome, seed)

    def draw(study: optuna.Study, trial: FrozenTrial, index: int) -> Mapping[str, float]:
        return cells[index] if index < len(cells) else rest(study, trial, index)

    return draw


def grid_points(genome: Genome, budget: int) -> int:
    """Values of every gene in a full grid of at most `budget` candidates."""
    points = int(budget ** (1 / len(genome)) + 1e-9)
    return points if points > 1 else 1


def of_optuna(genome: Genome, settings: SearchSettings) -> Draw:
    """TPE or NSGA-II of Optuna, seeded anew for every candidate."""

    def draw(study: optuna.Study, trial: FrozenTrial, index: int) -> Mapping[str, float]:
        if index == 0:
            return genome.start
        seed = seed_of(settings.seed, index)
        sampler: BaseSampler
        if settings.sampler == "tpe":
            sampler = TPESampler(seed=seed, multivariate=True)
        else:
            sampler = NSGAIISampler(seed=seed, population_size=settings.population or 50)
        space = distributions(genome)
        found = sampler.sample_relative(study, trial, space)
        for name, distribution in space.items():
            if name not in found:
                found[name] = sampler.sample_independent(study, trial, name, distribution)
        genes = {g.name: g for g in genome.genes}
        return {name: genes[name].rounded(value) for name, value in found.items()}

    return draw


# -- CMA-ES ---------------------------------------------------------------------------------------


def population(genes: int) -> int:
    """4 + floor(3 ln n)."""
    return 4 + math.floor(3 * math.log(max(genes, 1)))


def cma(genome: Genome, settings: SearchSettings) -> Draw:
    """CMA-ES on the unit cube, its state a function of the finished trials (`told`).

    The first candidates are uniform (`uniform_first`).
    """
    first = uniform_count(genome, settings)
    latest: Told | None = None

    def draw(study: optuna.Study, _: FrozenTrial, index: int) -> Mapping[str, float]:
        nonlocal latest
        if index == 0:
            return genome.start
        seed = seed_of(settings.seed, index)
        if index < first:
            return genome.from_unit(uniform_point(genome, seed))
        latest = told(genome, settings, counted(study.get_trials(deepcopy=False)), latest)
        latest.state.reseed_rng(seed)
        return genome.from_unit(latest.state.ask())

    return draw


def uniform_count(genome: Genome, settings: SearchSettings) -> int:
    """How many of the first candidates are uniform: none where the genome has nothing finer.

    Where the settings do not say, a third of the budget and 30 at most; 3 of a very small budget,
    if that leaves one for the strategy.
    """
    if len(_uniform_keys(genome)) == len(genome):
        return 0
    if settings.uniform_first is not None:
        return settings.uniform_first
    return min(30, max(settings.budget // 3, min(3, settings.budget - 1)))


def uniform_point(genome: Genome, seed: int) -> np.ndarray:
    """[n] in the unit cube: one value for all genes of a model and parameter."""
    keys = _uniform_keys(genome)
    drawn = dict(zip(keys, np.random.default_rng(seed).random(len(keys)), strict=True))
    return np.array([drawn[g.address[:2]] for g in genome.genes])


def _uniform_keys(genome: Genome) -> list[tuple[str, str]]:
    return list(dict.fromkeys(g.address[:2] for g in genome.genes))


@dataclass(frozen=True)
class Told:
    """A strategy after the trials of these numbers; whole: they are finished, the last ones too.

    size: of a generation. restarts: so far.
    """

    state: CMA | SepCMA
    numbers: tuple[int, ...]
    size: int
    restarts: int
    whole: bool


def replay(genome: Genome, settings: SearchSettings, trials: Sequence[FrozenTrial]) -> CMA | SepCMA:
    """The strategy after every full generation among the trials."""
    return told(genome, settings, trials).state


def told(
    genome: Genome,
    settings: SearchSettings,
    trials: Sequence[FrozenTrial],
    before: Told | None = None,
) -> Told:
    """The strategy after every full generation among the trials.

    It starts at the best of the uniform candidates. A generation is a run of `population` indices:
    with several workers a candidate may have been drawn one generation late, which the update
    bears. When it has converged it starts again from a random point with twice the population.

    before: what was told of earlier, used up, where the trials begin with the same ones; the result
    is the same without it, to the last bit (a copy of a state has another one, and of equal
    eigenvalues other vectors).
    """
    numbers = tuple(t.number for t in trials)
    if before is None or not before.whole or before.numbers != numbers[: len(before.numbers)]:
        before = _begun(genome, settings, trials)
    state, start = before.state, len(before.numbers)
    size, restarts = before.size, before.restarts
    while start + size <= len(trials):
        generation = trials[start : start + size]
        if not all(t.state.is_finished() for t in generation):
            break
        losses = _losses(generation)
        state.tell(
            [(genome.to_unit(t.params), loss) for t, loss in zip(generation, losses, strict=True)]
        )
        start += size
        if state.should_stop():
            restarts += 1
            size *= 2
            random = np.random.default_rng(seed_of(settings.seed, -restarts % 2**32))
            state = _strategy(random.random(len(genome)), size, settings)
    return Told(state, numbers[:start], size, restarts, before.whole)


def _begun(genome: Genome, settings: SearchSettings, trials: Sequence[FrozenTrial]) -> Told:
    """The strategy before its first generation."""
    size, count = settings.population or population(len(genome)), uniform_count(genome, settings)
    first = trials[:count]
    known = [t for t in first if math.isfinite(t.user_attrs.get(VALUE, math.nan))]
    best = max(known, key=lambda t: t.user_attrs[VALUE]).params if known else genome.start
    state = _strategy(genome.to_unit(best), size, settings)
    whole = len(first) == count and all(t.state.is_finished() for t in first)
    return Told(state, tuple(t.number for t in first), size, 0, whole)


def _strategy(mean: np.ndarray, size: int, settings: SearchSettings) -> CMA | SepCMA:
    kind = SepCMA if len(mean) > settings.separable_above else CMA
    bounds = np.tile([0.0, 1.0], (len(mean), 1))
    # Few resamplings: near a corner of many dimensions hardly any draw lies inside, and is clipped.
    return kind(
        mean=mean.copy(),
        sigma=settings.sigma,
        bounds=bounds,
        n_max_resampling=5,
        seed=settings.seed,
        population_size=size,
    )


def _losses(generation: Sequence[FrozenTrial]) -> list[float]:
    """What CMA-ES minimises; a failed candidate is worse than every other of its generation."""
    values = [-float(t.user_attrs.get(VALUE, math.nan)) for t in generation]
    finite = [v for v in values if math.isfinite(v)]
    worst = max(finite, default=0.0) + 1.0
    return [v if math.isfinite(v) else worst for v in values]


def centre(
    genome: Genome, settings: SearchSettings, trials: Sequence[FrozenTrial]
) -> dict[str, float]:
    """The mean of the strategy's distribution: less lucky than its best candidate."""
    mean = np.clip(replay(genome, settings, counted(trials)).mean, 0.0, 1.0)
    return genome.from_unit(mean)


def running(trial: FrozenTrial) -> bool:
    """Whether a trial was begun and not finished."""
    return bool(trial.state in (TrialState.RUNNING, TrialState.WAITING))
