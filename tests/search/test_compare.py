"""Comparisons of methods on the planted problem, through the command line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from mergekit_unconstrained import compat
from mergekit_unconstrained.catalog import CATALOG
from mergekit_unconstrained.cli import main
from mergekit_unconstrained.errors import RecipeError, UnconstrainedError
from mergekit_unconstrained.evaluation.records import Scored
from mergekit_unconstrained.hub import comparison
from mergekit_unconstrained.hub.comparison import Comparison, Entry
from mergekit_unconstrained.jobs import comparing
from mergekit_unconstrained.search.contenders import (
    SCALED,
    contenders,
    genome_for,
    recipe_for,
    tuned,
)
from tests.search.conftest import Planted

from mergekit.merge_methods import merge_tensors  # isort: skip

NAME = "model.layers.0.mlp.up_proj.weight"
METHODS = "layerwise,ties_global,slerp,karcher"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def compared(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four methods with three candidates each."""
    out = tmp_path_factory.mktemp("compared") / "out"
    result = run(planted.file, out, "--methods", METHODS, "--budget", 3)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return out


def content(out: Path) -> dict[str, Any]:
    found = json.loads((out / "compare.json").read_text())
    return {entry["name"]: entry for entry in found["entries"]}


def test_every_method_and_parent_has_scores_and_methods_have_a_cost(compared: Path) -> None:
    found = content(compared)
    assert set(found) == {"base", "first", "second", *METHODS.split(",")}
    for name, entry in found.items():
        task = entry["tasks"]["likely"]
        assert task["n"] == 30
        assert math.isfinite(task["mean"]), name
        assert task["mean"] == pytest.approx(entry["objective"])
        if name in METHODS:
            assert entry["failure"] == ""
            assert entry["cpu_seconds"] > 0
    assert found["ties_global"]["candidates"] == found["slerp"]["candidates"] == 3
    assert found["karcher"]["values"] == {}
    assert {k.split()[-1] for k in found["ties_global"]["values"]} >= {"density", "weight"}
    with (compared / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 * 30
    mean = math.fsum(float(r["value"]) for r in rows if r["model"] == "slerp") / 30
    assert mean == pytest.approx(found["slerp"]["objective"])


def test_the_table_is_ranked_and_the_plot_drawn(compared: Path) -> None:
    text = (compared / "compare.md").read_text()
    lines = [line.split("|")[1].strip() for line in text.splitlines() if " ± " in line[:60]]
    assert lines[:3] == ["base base", "expert first", "expert second"]
    found = content(compared)
    scores = [found[name.replace("\\", "")]["objective"] for name in lines[3:]]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 4
    assert (compared / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_recipe_of_a_method_scores_what_the_table_says(
    compared: Path, planted: Planted, tmp_path: Path
) -> None:
    """Its merge.yml, run as a job, has the test score that the comparison found in memory."""
    arguments = [str(compared / "ties_global" / "merge.yml"), str(tmp_path / "merged")]
    result = CliRunner().invoke(main, ["yaml", *arguments, "--quiet"])
    assert result.exit_code == 0, result.output
    task = yaml.safe_load(planted.file.read_text())["tasks"]["likely"]
    data = {split: str(planted.folder / name) for split, name in task["data"].items()}
    tasks = tmp_path / "tasks.yml"
    tasks.write_text(yaml.safe_dump({"tasks": {"likely": {**task, "data": data}}}))
    arguments = [str(tmp_path / "merged"), "--tasks", str(tasks), "--out", str(tmp_path / "scores")]
    result = CliRunner().invoke(main, ["evaluate", *arguments, "--split", "test"])
    assert result.exit_code == 0, result.output
    scored = [
        json.loads(line)["value"]
        for file in (tmp_path / "scores").rglob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    expected = content(compared)["ties_global"]["objective"]
    assert math.fsum(scored) / 30 == pytest.approx(expected, abs=1e-5)


def test_a_second_run_computes_nothing_anew(
    compared: Path, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(compared)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(comparing.searching, "live_merge", never)
    monkeypatch.setattr(comparing, "cost_of", never)
    result = run(planted.file, compared, "--methods", METHODS, "--budget", 3)
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert content(compared) == before


def test_a_method_that_fails_leaves_the_others_their_rows(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = comparing._entry

    def failing(method: Any, *arguments: Any) -> Entry:
        if method.spec.name == "varm":
            raise UnconstrainedError("of no | use")
        return entry(method, *arguments)

    monkeypatch.setattr(comparing, "_entry", failing)
    out = tmp_path / "out"
    result = run(planted.file, out, "--methods", "varm,karcher", "--budget", 2)
    assert result.exit_code == 0, result.output
    assert content(out)["varm"]["failure"] == "of no | use"
    assert content(out)["karcher"]["failure"] == ""
    assert "varm: failed, of no &#124; use" in (out / "compare.md").read_text()


def test_tuning_begins_at_the_methods_own_defaults() -> None:
    given = {"merge_method": "layerwise", "parameters": {}}
    starts = {}
    for name in ("consensus", "widen", "pcb", "optmerge", "ramplus_tl", "lines", "linear", "della"):
        genome = genome_for(compat.get(name), given, 3)
        assert genome is not None
        starts[name] = {k: r.start for k, r in (genome.parameters or {}).items()}
    assert starts["consensus"] == {"weight": 1.0, "tall_lambda": 0.4, "lambda": 0.3}
    assert starts["widen"] == {"weight": 1.0, "threshold": 1.0, "calibration": 1.0}
    assert starts["pcb"]["density"] == 0.1
    assert starts["optmerge"]["lambda"] == 0.1
    assert starts["ramplus_tl"] == {"r": 0.1, "alpha": 0.2}
    assert starts["lines"]["alpha"] == 0.5  # of `auto` and two experts
    assert starts["linear"] == {"weight": None}  # has no default
    assert starts["della"]["density"] == 0.5  # mergekit refuses its own default


@pytest.mark.parametrize("name", sorted(SCALED))
def test_lambda_is_not_tuned_where_it_does_what_the_weights_do(name: str) -> None:
    method, weight = compat.get(name), {"x": 0.3, "y": 0.2}
    base = torch.zeros(6, 8)
    experts = [torch.randn(6, 8, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]

    def merged(**parameters: Any) -> torch.Tensor:
        torch.manual_seed(0)  # of mergekit's random masks
        parameters |= {"alpha": 0.5, "beta": 0.3} if name == "lines" else {}
        tensors, ids = [base, *experts], ["base", "x", "y"]
        return merge_tensors(
            tensors, method, ids=ids, base_index=0, name=NAME, parameters=parameters
        )

    longer = merged(weight=weight, **{"lambda": 2.0})
    heavier = merged(weight={k: 2 * w for k, w in weight.items()})
    torch.testing.assert_close(longer, heavier)
    genome = genome_for(method, {"merge_method": "layerwise", "parameters": {}}, 3)
    assert "weight" in tuned(genome)
    assert "lambda" not in tuned(genome)


def test_a_dry_run_says_what_would_be_tuned_and_writes_no_table(
    planted: Planted, tmp_path: Path
) -> None:
    result = run(planted.file, tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "karcher: nothing to tune" in result.output
    assert "pcb: weight, density" in result.output
    assert "x 16 candidates" in result.output
    assert not (tmp_path / "out" / "compare.md").exists()


def test_a_wrong_name_gets_the_nearest_right_one(planted: Planted, tmp_path: Path) -> None:
    result = run(planted.file, tmp_path / "out", "--methods", "ties_globl")
    assert result.exit_code == 1
    assert "ties_global" in result.output


def test_without_a_test_split_there_is_nothing_to_compare(
    search_file: Callable[..., Path], tmp_path: Path
) -> None:
    file = search_file()
    data = yaml.safe_load(file.read_text())
    del data["tasks"]["likely"]["data"]["test"]
    file.write_text(yaml.safe_dump(data))
    result = run(file, tmp_path / "out")
    assert result.exit_code == 1
    assert "`test` split" in result.output


GIVEN = {
    "merge_method": "layerwise",
    "base_model": "base",
    "models": [{"model": "a"}, {"model": "b"}],
    "parameters": {"operator": "ties"},
    "dtype": "float32",
}


def test_all_are_our_tensor_methods_and_mergekits() -> None:
    names = [m.spec.name for m in contenders("all")]
    ours = [name for name, entry in CATALOG.items() if entry.level == "tensor"]
    assert set(names[: len(ours)]) == set(ours)
    assert {"ties", "karcher", "slerp", "linear", "model_stock"} <= set(names)
    assert "passthrough" not in names
    assert not any(name.startswith("mku_") for name in names)
    with pytest.raises(RecipeError, match="karcher"):
        contenders("karchr")


def test_a_recipe_has_the_models_that_its_method_takes() -> None:
    made = {m.spec.name: recipe_for(m, GIVEN) for m in contenders("all")}
    assert made["layerwise"] == GIVEN
    assert made["pcb"]["base_model"] == "base"
    assert "parameters" not in made["pcb"]
    for name in ("slerp", "nearswap", "linear", "karcher"):
        assert made[name]["base_model"] == "a", name
    assert all(recipe["dtype"] == "float32" for recipe in made.values())


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("layerwise", {"weight", "density"}),
        ("task_arithmetic", {"weight"}),
        ("dare_exact", {"weight", "drop"}),
        ("layer_swap", {"bottom", "top", "transition"}),
        ("lines", {"weight", "alpha", "beta"}),
        ("doge", {"eta", "top", "lambda"}),
        ("karcher", set()),
    ],
)
def test_the_numbers_that_matter_are_tuned(name: str, numbers: set[str]) -> None:
    assert set(tuned(genome_for(compat.get(name), GIVEN, layers=12))) == numbers


# -- the table alone ------------------------------------------------------------------------------


def scored(*values: float) -> list[Scored]:
    return [Scored(str(i), v) for i, v in enumerate(values)]


def entry(name: str, kind: str, exact: Sequence[float], nats: Sequence[float] = (0.0,)) -> Entry:
    return Entry(name, kind, scores={"exact": scored(*exact), "nats": scored(*nats)}, seconds=1.5,
                 memory=3 << 20)  # fmt: skip


def test_the_objective_is_the_weighted_mean_of_what_is_searched() -> None:
    table = Comparison(
        entries=[
            entry("one", "ours", [1, 0], [-1.0, -3.0]),
            entry("two", "mergekit", [1, 1], [-4]),
        ],
        units={"exact": "share", "nats": "nats"},
        weights={"exact": 0.0, "nats": 2.0},
        budget=4,
        seed=0,
    )
    one = table.entries[0]
    assert table.objective(one).mean == -2
    assert table.objective(one).error == pytest.approx(1.0)  # sqrt(2) / sqrt(2)
    assert [e.name for e in table.ranked] == ["one", "two"]
    assert comparison.cells(table, one) == [
        "one", "ours", "0.500 ± 0.980", "-2.000 ± 1.960", "-2.000 ± 1.960", "1.50", "3",
    ]  # fmt: skip


def test_local_paths_stay_private() -> None:
    table = Comparison([entry("/home/alice/base", "base", [1.0])], {"exact": "share"},
                       {"exact": 1.0}, 2, 0)  # fmt: skip
    for text in (comparison.markdown(table), comparison.as_json(table), comparison.rows(table)):
        assert "alice" not in text
