"""Whole searches on the planted problem, through the command line."""

from __future__ import annotations

import errno
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mergekit_unconstrained.cli import main
from mergekit_unconstrained.hub.provenance import load
from mergekit_unconstrained.present.bars import quiet
from mergekit_unconstrained.search.objective import Objective
from mergekit_unconstrained.search.settings import SearchSettings
from tests.search.conftest import Planted


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["search", *map(str, arguments)])


def succeed(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return str(result.output)


def report(out: Path) -> Any:
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def searched(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of the planted search with 45 candidates."""
    out = tmp_path_factory.mktemp("searched") / "out"
    succeed(planted.file, out, "--budget", 45)
    return out


def test_the_search_finds_more_than_every_parent_and_uniform_merge(searched: Path) -> None:
    (task,) = report(searched)["tasks"]
    assert len(task["differences"]) == 5  # base, two experts, two baselines
    for other, (_, low, _) in task["differences"].items():
        assert low > 0, f"not above {other}"


def test_the_planted_coefficients_are_near(searched: Path) -> None:
    values = report(searched)["values"]
    assert values["first weight layers 0-1"] > values["second weight layers 0-1"] + 0.3


def test_the_folder_loads_and_says_what_was_done(searched: Path) -> None:
    names = {p.name for p in searched.iterdir()}
    assert {
        "model.safetensors", "README.md", "merge.yml", "coefficients.yml", "coefficients.png",
        "report.md", "report.json", "plots",
    } <= names  # fmt: skip
    assert {p.name for p in (searched / "plots").iterdir()} == {"history.png", "importance.png"}
    page = (searched / "report.md").read_text()
    for said in (
        "searched",
        "uniform (grid)",
        "uniform (random)",
        "± one standard error",
        "Counted",
    ):
        assert said in page
    assert str(searched.parent) not in page + json.dumps(report(searched))


def test_the_recipe_alone_gives_the_same_weights(searched: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((searched.parent / "out.search/best/merge.yml").read_text())
    table = searched / "coefficients.yml"
    recipe["parameters"]["coefficients"] = str(table)
    path = tmp_path / "again.yml"
    path.write_text(yaml.safe_dump(recipe))
    out = tmp_path / "again"
    result = CliRunner().invoke(main, ["yaml", str(path), str(out), "--quiet"])
    assert result.exit_code == 0, result.output
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (searched / weights).read_bytes()


def test_mergekit_alone_makes_the_same_weights_of_the_stock_recipe(
    searched: Path, planted: Planted, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    recipe = yaml.safe_load((searched / "stock_merge.yml").read_text())
    assert recipe["merge_method"] == "task_arithmetic"
    recipe["base_model"] = str(planted.base)
    for entry, folder in zip(recipe["models"], planted.experts, strict=True):
        entry["model"] = str(folder)
    path, out = tmp_path / "stock.yml", tmp_path / "stock"
    path.write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(main, ["yaml", str(path), str(out), "--quiet"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    theirs, ours = (load_file(f / "model.safetensors") for f in (out, searched))
    assert theirs.keys() == ours.keys()
    assert all((theirs[name] == ours[name]).all() for name in ours)


def log_likelihood(folder: Path, rows: Sequence[dict[str, str]]) -> list[float]:
    """nats per byte by the plain forward pass of one row at a time, in float64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = model.generation_config.eos_token_id
    found = []
    for row in rows:
        prompt, answer = (tokenizer(row[k])["input_ids"] for k in ("prompt", "target"))
        ids = torch.tensor([[*prompt, *answer, end]])
        with torch.inference_mode():
            chances = model(ids).logits[0].log_softmax(-1)
        nats = sum(float(chances[i - 1, ids[0, i]]) for i in range(len(prompt), ids.shape[1]))
        found.append(nats / len(row["target"].encode()))
    return found


def test_an_independent_scorer_gives_the_reported_figures(searched: Path, planted: Planted) -> None:
    rows = [json.loads(line) for line in (planted.folder / "test.jsonl").read_text().splitlines()]
    (task,) = report(searched)["tasks"]
    for name, folder in {
        "searched": searched, "base": planted.base, "first": planted.experts[0],
    }.items():  # fmt: skip
        own = log_likelihood(folder, rows)
        mean, error, n = task["means"][name]
        assert n == len(own) == 30
        assert mean == pytest.approx(math.fsum(own) / n, abs=1e-4)
        spread = math.fsum((v - mean) ** 2 for v in own) / (n - 1)
        assert error == pytest.approx(math.sqrt(spread / n), abs=1e-4)


def test_every_study_had_as_many_candidates(searched: Path) -> None:
    found = report(searched)
    assert {s["label"]: s["candidates"] for s in found["studies"]} == {
        "searched": 45, "uniform (grid)": 45, "uniform (random)": 45,
    }  # fmt: skip
    assert all(len(found["history"][s["label"]]) == 45 for s in found["studies"])


def test_equal_candidates_have_equal_scores(searched: Path) -> None:
    seen: dict[str, float] = {}
    for study in report(searched)["history"].values():
        for one in study:
            if not one["dropped"]:
                key = json.dumps(one["values"], sort_keys=True)
                assert seen.setdefault(key, one["value"]) == one["value"]


def test_a_search_that_is_interrupted_gives_the_same_answer(
    search_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = search_file(budget=12, baselines=["random"])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert "the 23 left are" in " ".join(succeed(path, whole).split())
    plain = Objective.score
    for stop in (3, 9, 5):
        left = [stop]

        def score(self: Any, *args: Any, left: list[int] = left, **kw: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return plain(self, *args, **kw)

        monkeypatch.setattr(Objective, "score", score)
        assert run(path, parts).exit_code != 0
        monkeypatch.setattr(Objective, "score", plain)
        assert not parts.exists()
    succeed(path, parts)
    one, two = report(whole), report(parts)
    assert one["values"] == two["values"]
    for label, study in one["history"].items():
        again = two["history"][label]
        assert [(f["values"], f["value"]) for f in study] == [
            (f["values"], f["value"]) for f in again
        ]
    weights = "model.safetensors"
    assert (whole / weights).read_bytes() == (parts / weights).read_bytes()


def test_permuted_labels_are_no_synergy(
    search_file: Callable[..., Path], planted: Planted, tmp_path: Path
) -> None:
    data = {}
    for split in ("search", "development", "test"):
        rows = [json.loads(s) for s in (planted.folder / f"{split}.jsonl").read_text().splitlines()]
        if split != "test":
            targets = [row["target"] for row in rows]
            rows = [
                {**r, "target": t} for r, t in zip(rows, targets[7:] + targets[:7], strict=True)
            ]
        data[split] = str(tmp_path / f"{split}.jsonl")
        Path(data[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {
        "likely": {"kind": "likelihood", "data": data},
        "said": {"kind": "exact", "data": data, "max_new_tokens": 5},
    }
    out = tmp_path / "out"
    succeed(search_file(tasks=tasks, budget=10, baselines=["uniform_grid"]), out)
    said = report(out)["verdict"]
    assert said[-1].startswith("No synergy found")
    assert "No synergy found" in (out / "report.md").read_text()


def test_dry_run_says_what_it_would_cost_and_writes_no_model(
    search_file: Callable[..., Path], tmp_path: Path
) -> None:
    said = " ".join(succeed(search_file(uniform_first=None), tmp_path / "out", "--dry-run").split())
    for words in (
        "6 numbers",
        "cma, population 9",
        "first 13 of 40 candidates are uniform",
        "3 studies",
        "x 40 candidates",
        "30 examples",
        "live model",
        "told when the first candidate is scored",
    ):
        assert words in said
    assert list(tmp_path.iterdir()) == [tmp_path / "search.yml"]


def test_a_configuration_of_mergekit_evolve_is_read(planted: Planted, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from mergekit_unconstrained.config.document import Document
    from mergekit_unconstrained.search.evolve import is_evolve, translated

    base, (first, second) = str(planted.base), map(str, planted.experts)
    config = {
        "genome": {
            "models": [first, second], "merge_method": "ties", "base_model": base,
            "layer_granularity": 2, "filters": ["self_attn", "mlp"],
        },
        "tasks": [{"name": "spartqa_train", "weight": 2.0, "metric": "acc,none"}, "other_train"],
        "limit": 50,
    }  # fmt: skip
    assert is_evolve(config)
    ours = translated(Document("evolve.yml", config))
    assert ours["genome"]["layers"] == 2
    assert ours["recipe"]["parameters"] == {"normalize": True}
    task = ours["tasks"]["spartqa_train"]
    assert (task["splits"], task["metric"], task["filter"]) == ({"search": "0:50"}, "acc", "none")
    wrong = {**config, "genome": {**config["genome"], "layer_granulrity": 2}}
    path = tmp_path / "wrong.yml"
    path.write_text(yaml.safe_dump(wrong))
    result = run(path, tmp_path / "out")
    assert "Did you mean 'layer_granularity'" in result.output


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budgett": 3}, "Did you mean 'budget'"),
        ({"budget": 0}, "budget"),
        ({"genome": {"kindz": []}}, "Did you mean 'kinds'"),
        ({"genome": {"kinds": ["attentoin"]}}, "Did you mean 'attention'"),
        ({"genome": {"parameters": {"wieght": {}}}}, "Did you mean 'weight'"),
        ({"genome": {"parameters": {"weight": {"low": 2, "high": 1}}}}, "low < high"),
        ({"sampler": "cmaes"}, "sampler"),
        ({"tasks": {}}, "tasks"),
        ({"tasks": "none.yml"}, "none.yml"),
        ({"recipe": "none.yml"}, "none.yml"),
        ({"recipe": {"merge_method": "layrwise", "models": []}}, "layerwise"),
    ],
)
def test_bad_input_is_one_clear_error(
    changes: dict[str, Any], words: str, search_file: Callable[..., Path], tmp_path: Path
) -> None:
    result = run(search_file(**changes), tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert words in " ".join(result.output.split())
    assert result.output.count("Error") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_operator_is_named_where_it_was_written(
    planted: Planted, search_file: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = yaml.safe_load(planted.file.read_text())["recipe"]
    recipe["parameters"]["operator"] = "task_arithmetics"
    path = search_file(recipe=recipe)
    lines = path.read_text().splitlines()
    line = 1 + lines.index("    operator: task_arithmetics")
    said = " ".join(run(path, tmp_path / "out").output.split())
    assert f"search.yml:{line}: parameters.operator: " in said
    assert "Did you mean 'task_arithmetic'" in said


@pytest.mark.parametrize("command", ["search", "evaluate"])
def test_a_wrong_file_is_refused_before_torch_is_imported(command: str, tmp_path: Path) -> None:
    given = {"search": ["wrong.yml", "out"], "evaluate": ["model", "--tasks", "wrong.yml"]}[command]
    code = (
        "import sys; from click.testing import CliRunner; from mergekit_unconstrained.cli import "
        f"main; found = CliRunner().invoke(main, {[command, *given]}); print(found.output); "
        "sys.exit(found.exit_code + 10 * ('torch' in sys.modules))"
    )
    recipe = "recipe: {}\n" if command == "search" else ""
    (tmp_path / "wrong.yml").write_text(recipe + "tasks: {one: {kind: exactt}}\n")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "Did you mean 'exact'" in done.stdout
    assert done.returncode == 1


def test_a_search_of_other_settings_does_not_mix_with_what_is_there(
    search_file: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    succeed(search_file(budget=4, baselines=[]), out)
    (out.rename(tmp_path / "aside"))
    result = run(search_file(budget=4, baselines=[], seed=1), out)
    assert result.exit_code == 1
    assert "other models, tasks or settings" in " ".join(result.output.split())


def test_settings_are_explained_and_are_the_defaults() -> None:
    said = succeed("settings")
    data = yaml.safe_load(said)
    defaults = SearchSettings(recipe={}).model_dump(mode="json")
    assert {**data, "recipe": {}} == defaults
    for words in ("# One of cma, tpe", "# recipe:   (required)", "uniform_first: null"):
        assert words in said or words.removeprefix("# ") in said
    for field in SearchSettings.model_fields.values():
        assert field.description, field


def test_the_merge_file_runs_from_where_the_search_ran(searched: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((searched / "merge.yml").read_text())
    found = yaml.safe_load(recipe["parameters"]["coefficients"])
    assert found == yaml.safe_load((searched / "coefficients.yml").read_text())
    kept = yaml.safe_load((searched.parent / "out.search/best/merge.yml").read_text())
    kept["parameters"]["coefficients"] = recipe["parameters"]["coefficients"]
    path, out = tmp_path / "merge.yml", tmp_path / "again"
    path.write_text(yaml.safe_dump(kept))
    result = CliRunner().invoke(main, ["yaml", str(path), str(out), "--quiet"])
    assert result.exit_code == 0, result.output
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (searched / weights).read_bytes()


def test_the_card_says_that_it_was_searched_and_how_good_it_is(searched: Path) -> None:
    card = (searched / "README.md").read_text()
    assert "found by a search: cma, 45 candidates" in card
    assert "not been evaluated" not in card
    assert "this model" in card
    assert "[report.md](./report.md)" in card


def test_the_card_agrees_with_the_report_and_the_merge_can_be_made_again(
    planted: Planted, searched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (searched / "README.md").read_text()
    (task,) = report(searched)["tasks"]
    for model, (value, error, n) in task["means"].items():
        name = "this model" if model == "searched" else model
        assert f"| {name} | {value:.4g} | {error:.2g} | {n} |" in card
    splits = report(searched)["splits"][task["name"]]
    for split, count in splits.items():
        assert f"{count} {split}" in card
    known = load(searched)
    assert [d.rows for d in known.data] == [splits]
    assert {"report.json", "plots/history.png", "merge.yml"} <= {f.name for f in known.files}
    monkeypatch.chdir(planted.folder)
    for command in ("verify", "reproduce"):
        result = CliRunner().invoke(main, [command, str(searched)])
        assert result.exit_code == 0, result.output


def test_a_finished_search_says_how_to_go_on(
    search_file: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    path = search_file(budget=3, baselines=[])
    succeed(path, out)
    said = " ".join(run(path, out).output.split())
    assert "keeps every candidate" in said
    assert "larger --budget" in said
    shutil.rmtree(out)
    succeed(path, out, "--budget", 5)
    assert report(out)["studies"][0]["candidates"] == 5


def test_a_grid_of_too_many_numbers_is_refused(
    search_file: Callable[..., Path], tmp_path: Path
) -> None:
    result = run(search_file(sampler="grid", budget=16), tmp_path / "out")
    assert "a grid of 6 numbers takes 64 candidates" in " ".join(result.output.split())


def test_a_search_runs_on_a_task_of_lm_eval(
    search_file: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    rows = [
        {"question": f"What is {i}?", "choices": ["x", "yes", "no way"], "gold": i % 3}
        for i in range(9)
    ]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    own = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"validation": "all.jsonl"},
            "cache_dir": str(tmp_path / "cache"),
        },
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    task = {
        "kind": "harness",
        "task": "own.yaml",
        "splits": {"search": "0:5", "test": "5:9"},
    }
    out = tmp_path / "out"
    succeed(search_file(tasks={"choice": task}, budget=3, baselines=[]), out)
    (found,) = report(out)["tasks"]
    assert (found["unit"], found["n"]) == ("acc", 4)


def test_other_test_data_are_scored_anew(
    search_file: Callable[..., Path], planted: Planted, tmp_path: Path
) -> None:
    data = {}
    for split in ("search", "development", "test"):
        data[split] = str(tmp_path / f"{split}.jsonl")
        shutil.copy(planted.folder / f"{split}.jsonl", data[split])
    tasks = {"likely": {"kind": "likelihood", "data": data, "separator": ""}}
    path, out = search_file(tasks=tasks, budget=3, baselines=[]), tmp_path / "out"
    succeed(path, out)
    before = report(out)["tasks"][0]["means"]
    lines = Path(data["test"]).read_text().splitlines(keepends=True)
    Path(data["test"]).write_text("".join(lines[:20]))
    shutil.rmtree(out)
    succeed(path, out)
    after = report(out)["tasks"][0]["means"]
    assert before["searched"][2] == 30
    assert after["searched"][2] == 20


def test_the_best_on_development_wins_when_its_score_is_zero() -> None:
    from types import SimpleNamespace

    from mergekit_unconstrained.search import finals

    values = ({"a": 0.0}, {"a": 1.0})
    keys = [json.dumps(["random", v], sort_keys=True) for v in values]
    known = dict(zip(keys, (-1.0, 0.0), strict=True))
    task = SimpleNamespace(splits=lambda: ("development",), weight=1.0, name="t",
                           examples=lambda _: ["one"])  # fmt: skip
    settings = SimpleNamespace(seed=0, finalists=2, sampler="random")
    finished = [
        SimpleNamespace(values=v, value=0.5, dropped=False, failure="", number=i)
        for i, v in enumerate(values)
    ]
    searcher: Any = SimpleNamespace(settings=settings, tasks=[task])
    study: Any = SimpleNamespace(finished=finished)
    cache: Any = SimpleNamespace(get=lambda key, _: known[key])
    chosen = finals.choose(searcher, {"random": study}, cache, quiet)
    assert chosen["random"].values == {"a": 1.0}


def test_a_full_disk_is_one_sentence_and_the_search_goes_on(
    search_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_unconstrained.search import finals

    path, out = search_file(budget=3, baselines=[]), tmp_path / "out"

    def full(_: Path) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(finals, "replacing", full)
        result = run(path, out)
    assert result.exit_code == 1
    assert "the disk is full" in " ".join(result.output.split())
    assert not out.exists()
    succeed(path, out)
    assert report(out)["studies"][0]["candidates"] == 3


def test_time_of_earlier_runs_counts(search_file: Callable[..., Path], tmp_path: Path) -> None:
    file, out = search_file(budget=12, baselines=[]), tmp_path / "out"
    succeed(file, out)
    spent = report(out)["studies"][0]["seconds"]
    out.rename(tmp_path / "aside")
    succeed(file, out, "--budget", 400, "--time", f"{spent / 2}")
    assert report(out)["studies"][0]["candidates"] == 12
    out.rename(tmp_path / "aside, too")
    succeed(file, out, "--budget", 13, "--time", "1h")
    assert report(out)["studies"][0]["candidates"] == 13


def test_models_that_are_called_as_the_table_calls_its_candidates(
    planted: Planted, search_file: Callable[..., Path], tmp_path: Path
) -> None:
    names = ("searched", "other/searched")
    for name, folder in zip(names, planted.experts, strict=True):
        shutil.copytree(folder, tmp_path / name)
    recipe = yaml.safe_load(planted.file.read_text())["recipe"]
    recipe["models"] = [{"model": str(tmp_path / name)} for name in names]
    succeed(search_file(budget=6, baselines=[], recipe=recipe), tmp_path / "out")
    found = report(tmp_path / "out")
    (task,) = found["tasks"]
    experts = ["expert searched", "expert searched (2)"]
    assert found["parents"] == ["base", *experts]
    assert list(task["means"]) == ["base", *experts, "searched"]
    assert len({tuple(task["means"][name]) for name in experts}) == 2
