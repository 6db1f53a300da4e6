"""How candidates are drawn: against cmaes driven by hand, known minima, and plain statistics."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import optuna
import pytest
from cmaes import CMA, SepCMA
from optuna.trial import TrialState
from scipy import stats

from mergekit_unconstrained.search.genome import Gene, Genome
from mergekit_unconstrained.search.samplers import (
    FAILURE,
    VALUE,
    centre,
    counted,
    grid_points,
    make_sampler,
    population,
    replay,
    seed_of,
    told,
    uniform_count,
)
from mergekit_unconstrained.search.settings import SearchSettings

Score = Callable[[np.ndarray], float]
"""Of a point of the unit cube."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(level)


def genome_of(count: int, low: float = -2.0, high: float = 3.0) -> Genome:
    genes = (
        Gene((f"m{i}", "weight", None, ""), low, high, 0.5, called=f"m{i}") for i in range(count)
    )
    return Genome(tuple(genes), ())


def settings_of(**given: Any) -> SearchSettings:
    return SearchSettings(recipe={}, **given)


def study_of(genome: Genome, settings: SearchSettings) -> optuna.Study:
    return optuna.create_study(direction="maximize", sampler=make_sampler(genome, settings))


def ask(study: optuna.Study, genome: Genome) -> optuna.Trial:
    trial = study.ask()
    for gene in genome.genes:
        trial.suggest_float(gene.name, gene.low, gene.high)
    return trial


def go_on(study: optuna.Study, genome: Genome, score: Score, count: int) -> None:
    """Draw and tell candidates; a score of NaN is a failure."""
    for _ in range(count):
        trial = ask(study, genome)
        value = score(genome.to_unit(trial.params))
        if math.isnan(value):
            trial.set_user_attr(FAILURE, "bad")
            study.tell(trial, state=TrialState.FAIL)
        else:
            trial.set_user_attr(VALUE, value)
            study.tell(trial, value)


def sphere(x: np.ndarray) -> float:
    """Highest, 0, at (0.3, 0.4, 0.5, ...)."""
    return -float(((x - 0.3 - 0.1 * (np.arange(len(x)) % 5)) ** 2).sum())


def drawn(study: optuna.Study) -> list[dict[str, float]]:
    return [dict(t.params) for t in counted(study.trials)]


# -- CMA-ES ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("genes", "size"), [(1, 4), (2, 6), (6, 9), (10, 10), (60, 16), (120, 18), (0, 4)]
)
def test_the_population_is_hansens(genes: int, size: int) -> None:
    assert population(genes) == size


@pytest.mark.parametrize("separable", [False, True])
def test_candidates_are_those_of_cmaes_driven_by_hand(separable: bool) -> None:
    genome = genome_of(5)
    settings = settings_of(seed=7, sigma=0.2, separable_above=4 if separable else 5)
    study = study_of(genome, settings)
    go_on(study, genome, sphere, 4 * 8 + 3)

    kind = SepCMA if separable else CMA
    by_hand = kind(
        mean=genome.to_unit(genome.start),
        sigma=0.2,
        bounds=np.array([[0.0, 1.0]] * 5),
        population_size=8,
        n_max_resampling=5,
    )
    expected: list[dict[str, float]] = []
    for index in range(4 * 8 + 3):
        if index and index % 8 == 0:
            points = [genome.to_unit(values) for values in expected[-8:]]
            by_hand.tell([(x, -sphere(x)) for x in points])
        by_hand.reseed_rng(seed_of(7, index))
        expected.append(genome.from_unit(by_hand.ask()) if index else genome.start)
    assert drawn(study) == expected


@pytest.mark.parametrize(
    ("budget", "uniform"),
    [(1, 0), (2, 1), (4, 3), (9, 3), (12, 4), (30, 10), (89, 29), (90, 30), (200, 30)],
)
def test_a_small_budget_has_fewer_uniform_candidates(budget: int, uniform: int) -> None:
    kinds = ("attention", "mlp")
    genes = (Gene(("m", "weight", None, k), 0.0, 1.0, 0.5, called=k) for k in kinds)
    genome = Genome(tuple(genes), ())
    assert uniform_count(genome, settings_of(budget=budget)) == uniform
    assert uniform_count(genome, settings_of(budget=budget, uniform_first=7)) == 7
    assert uniform_count(genome_of(3), settings_of(budget=budget)) == 0, "nothing finer there"
    if budget == 12:
        study = study_of(genome, settings_of(budget=budget))
        go_on(study, genome, sphere, budget)
        assert [len(set(values.values())) for values in drawn(study)] == [1] * 4 + [2] * 8


def test_the_minimum_of_a_sphere_is_found() -> None:
    genome, settings = genome_of(6), settings_of()
    study = study_of(genome, settings)
    go_on(study, genome, sphere, 250)
    assert study.best_value > -1e-3
    assert sphere(genome.to_unit(centre(genome, settings, study.trials))) > -1e-3
    assert study.trials[0].params == genome.start


def state_of(genome: Genome, settings: SearchSettings, study: optuna.Study) -> Any:
    return replay(genome, settings, counted(study.trials))


def test_a_flat_score_restarts_with_twice_the_population() -> None:
    genome, settings = genome_of(2), settings_of(population=4, seed=3)
    points = np.random.default_rng(0).random((400, 2))
    trials = [finished(genome, settings, point, {VALUE: 1.0}) for point in points]
    sizes, means = [], []
    for count in range(0, 400, 4):
        state = replay(genome, settings, trials[:count])
        if not sizes or sizes[-1] != state.population_size:
            sizes.append(state.population_size)
            means.append(tuple(state.mean))
            # The strategy's memory of the last scores is 10 + ceil(30 n / population) long.
            expected = [0, 4 * 26, 4 * 26 + 8 * 19]
            assert abs(count - expected[len(sizes) - 1]) <= 8
        if len(sizes) == 3:
            break
    assert sizes == [4, 8, 16]
    assert len(set(means)) == 3  # from another random point each time


@pytest.mark.parametrize("uniform_first", [0, 5])
def test_a_strategy_that_goes_on_is_the_one_that_begins_anew(uniform_first: int) -> None:
    settings = settings_of(population=4, seed=3, uniform_first=uniform_first)
    genes = [Gene(("m", "weight", i, "k"), 0, 1, 0.5, place=f"layer {i}") for i in range(12)]
    genome = Genome(tuple(genes), ())
    points = np.random.default_rng(0).random((60, 12))
    trials = [finished(genome, settings, point, {VALUE: float(point @ point)}) for point in points]
    for number, trial in enumerate(trials):
        trial.number = number
    going = None
    for count in range(1, 60):
        going = told(genome, settings, trials[:count], going)
        anew = told(genome, settings, trials[:count])
        assert going.numbers == anew.numbers
        for one in (going, anew):
            one.state.reseed_rng(count)
        assert np.array_equal(going.state.ask(), anew.state.ask())
    others = copy.deepcopy(trials[::-1])  # of another study
    for number, trial in enumerate(others):
        trial.number = number + 100
    other = told(genome, settings, others, going)
    assert other.numbers == told(genome, settings, others).numbers
    assert np.array_equal(other.state.mean, told(genome, settings, others).state.mean)


def test_many_genes_have_a_diagonal_covariance() -> None:
    settings = settings_of(separable_above=3)
    assert isinstance(replay(genome_of(4), settings, []), SepCMA)
    assert isinstance(replay(genome_of(3), settings, []), CMA)


def finished(
    genome: Genome,
    settings: SearchSettings,
    point: np.ndarray,
    attributes: dict[str, Any],
    state: TrialState = TrialState.COMPLETE,
) -> optuna.trial.FrozenTrial:
    return optuna.trial.create_trial(
        state=state,
        value=attributes.get(VALUE) if state == TrialState.COMPLETE else None,
        params=genome.from_unit(point),
        distributions=make_sampler(genome, settings).space,
        user_attrs=attributes,
    )


def strategy(seen: Mapping[int, tuple[TrialState, dict[str, Any]]]) -> np.ndarray:
    """The mean after one generation of 6 fixed points; seen: index -> state and attributes."""
    genome, settings = genome_of(3), settings_of(population=6)
    study = study_of(genome, settings)
    for index, point in enumerate(np.random.default_rng(0).random((6, 3))):
        state, attributes = seen.get(index, (TrialState.COMPLETE, {VALUE: float(index)}))
        study.add_trial(finished(genome, settings, point, attributes, state))
    return np.array(state_of(genome, settings, study).mean)


def test_a_failed_candidate_ranks_last() -> None:
    # Index 5 is best otherwise.
    failed = strategy({5: (TrialState.FAIL, {FAILURE: "bad"})})
    last = strategy({5: (TrialState.COMPLETE, {VALUE: -1e9})})
    assert np.array_equal(failed, last)
    assert not np.array_equal(failed, strategy({}))


def test_a_dropped_candidate_ranks_by_its_estimate() -> None:
    dropped = strategy({2: (TrialState.PRUNED, {VALUE: 4.5})})
    assert np.array_equal(dropped, strategy({2: (TrialState.COMPLETE, {VALUE: 4.5})}))
    assert not np.array_equal(dropped, strategy({}))


def test_a_generation_of_failures_only_does_no_harm() -> None:
    every = {i: (TrialState.FAIL, {FAILURE: "bad"}) for i in range(6)}
    assert np.isfinite(strategy(every)).all()


def test_an_unfinished_generation_is_waited_for() -> None:
    genome, settings = genome_of(3), settings_of(population=6)
    study = study_of(genome, settings)
    pending = ask(study, genome)
    go_on(study, genome, sphere, 8)
    assert np.array_equal(state_of(genome, settings, study).mean, genome.to_unit(genome.start))
    pending.set_user_attr(VALUE, 0.0)
    study.tell(pending, 0.0)
    assert state_of(genome, settings, study).generation == 1


# -- grid, random ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("genes", "budget", "points"),
    [(2, 9, 3), (2, 15, 3), (2, 16, 4), (3, 27, 3), (1, 7, 7), (4, 15, 1)],
)
def test_a_grid_has_as_many_points_as_the_budget_allows(
    genes: int, budget: int, points: int
) -> None:
    assert grid_points(genome_of(genes), budget) == points


def test_a_grid_covers_every_cell_once() -> None:
    genome, settings = genome_of(2), settings_of(sampler="grid", budget=11)
    study = study_of(genome, settings)
    go_on(study, genome, sphere, 11)
    found = drawn(study)
    axis = [-2.0, 0.5, 3.0]
    expected = [{"m0 weight": a, "m1 weight": b} for a, b in itertools.product(axis, axis)]
    assert found[:9] == expected
    assert all(one not in expected for one in found[9:])  # what is left of the budget


def test_random_candidates_are_uniform_between_their_bounds() -> None:
    genome, settings = genome_of(2), settings_of(sampler="random")
    study = study_of(genome, settings)
    go_on(study, genome, sphere, 400)
    found = np.array([list(v.values()) for v in drawn(study)])
    assert drawn(study)[0] == genome.start
    for column in found[1:].T:
        assert stats.kstest(column, stats.uniform(-2.0, 5.0).cdf).pvalue > 0.01
    assert abs(np.corrcoef(found[1:].T)[0, 1]) < 0.15
    assert (np.round(found, 4) == found).all()


# -- every sampler --------------------------------------------------------------------------------

SAMPLERS = ("cma", "tpe", "random", "grid", "nsga2")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_abandoned_trial_changes_nothing(sampler: str) -> None:
    genome = genome_of(3)
    settings = settings_of(sampler=sampler, population=5, budget=24)
    calm, rough = study_of(genome, settings), study_of(genome, settings)
    go_on(calm, genome, sphere, 24)
    for index in range(24):
        if index in (0, 5, 11, 12):
            lost = ask(rough, genome)
            rough.tell(lost, state=TrialState.FAIL)  # without a reason: its process died
            again = ask(rough, genome)
            assert again.params == lost.params
            rough.tell(again, state=TrialState.FAIL)
        go_on(rough, genome, sphere, 1)
    assert drawn(rough) == drawn(calm)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_draws_depend_on_the_seed_and_on_nothing_else(sampler: str) -> None:
    genome = genome_of(3)
    found = []
    for seed in (1, 1, 2):
        np.random.seed(len(found))  # as others do with the global state
        settings = settings_of(sampler=sampler, seed=seed, population=5, budget=12)
        study = study_of(genome, settings)
        go_on(study, genome, sphere, 12)
        found.append(drawn(study))
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert all(-2.0 <= v <= 3.0 for one in found[0] for v in one.values())


def test_seeds_differ_from_candidate_to_candidate() -> None:
    assert len({seed_of(s, i) for s in range(20) for i in range(50)}) == 1000
    assert seed_of(1, 2) == seed_of(1, 2) != seed_of(2, 1)
