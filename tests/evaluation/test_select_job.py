"""`select`: what it lacks is told before a model is scored; the recipe and ranking it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mergekit_unconstrained import compat, jobs
from mergekit_unconstrained.config.recipe import check_recipe
from mergekit_unconstrained.errors import DataError, OutputError, RecipeError
from mergekit_unconstrained.evaluation.records import Scored
from mergekit_unconstrained.evaluation.run import Results, TaskResult
from mergekit_unconstrained.jobs import selecting
from mergekit_unconstrained.jobs.families import read_families

ROW = {"prompt": "1+1=", "target": "2"}
FAMILIES = {"mathematics": ["sums", "more"], "code": "programs"}


@pytest.fixture(scope="module")
def models(tmp_path_factory, random_model, byte_tokenizer):
    """base, one, two: of one architecture; other: of another."""
    folder = tmp_path_factory.mktemp("candidates")
    for seed, name in enumerate(("base", "one", "two", "other")):
        model = random_model("gpt2" if name == "other" else "llama", seed=seed).float()
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def families(write_tasks, tmp_path):
    """`families(base=...)`: a families file with a tasks file beside it."""
    names = ("sums", "more", "programs")
    write_tasks({name: {"kind": "exact", "data": "rows.jsonl"} for name in names}, rows=[ROW])

    def make(**more):
        path = tmp_path / "families.yml"
        told = {"families": FAMILIES, "tasks": "tasks.yml", **more}
        path.write_text(yaml.safe_dump(told), encoding="utf-8")
        return path

    return make


@pytest.fixture
def scored(monkeypatch):
    """`scored({"one": (1, 0)})`: by the end of a model's name, its values at sums and programs."""

    def result(name, value):
        return TaskResult(name, "exact match", 1.0, 1.0, (Scored("0", value),))

    def give(values):
        def evaluate(names, *_, **__):
            return [
                Results(
                    name,
                    "development",
                    (
                        result("sums", values[Path(name).name][0]),
                        result("more", 0.0),
                        result("programs", values[Path(name).name][1]),
                    ),
                )
                for name in names
            ]

        monkeypatch.setattr(selecting, "evaluate_models", evaluate)

    return give


@pytest.fixture
def unscored(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("scored")

    monkeypatch.setattr(selecting, "evaluate_models", refuse)


def named(models, *names):
    return [str(models / name) for name in names]


@pytest.mark.parametrize(
    ("names", "more", "error", "told"),
    [
        (("one", "two"), {}, RecipeError, "merged by weights .*name the `base`"),
        (("one", "other"), {}, RecipeError, "differ in architecture.*name a `dataset`"),
        (("one", "other", "two"), {"base": "BASE"}, RecipeError, "name a `dataset`"),
        (("one", "two"), {"base": "OTHER"}, RecipeError, "yml:1: base: .*is not the base of"),
        (("one", "other"), {"dataset": "./none.jsonl"}, DataError, "none.jsonl does not exist"),
        (("one", "two"), {"experts": ["maths"]}, RecipeError, "no family 'maths'. Did you mean"),
    ],
)
def test_what_a_pair_of_candidates_would_need_is_told_before_scoring(
    models, families, unscored, tmp_path, names, more, error, told
):
    places = {"BASE": str(models / "base"), "OTHER": str(models / "other")}
    file = families(**{key: places.get(str(value), value) for key, value in more.items()})
    with pytest.raises(error, match=told):
        selecting.select(named(models, *names), file, tmp_path / "out.yml")


def test_leave_to_run_code_is_asked_when_models_are_scored(write_tasks, tmp_path):
    write_tasks({"programs": {"kind": "code", "data": "rows.jsonl"}}, rows=[ROW])
    file = tmp_path / "families.yml"
    file.write_text("families: {code: programs}\ntasks: tasks.yml\n")
    assert read_families(file).experts == ("code",)


def test_a_recipe_that_cannot_be_written_is_told_before_scoring(
    models, families, unscored, tmp_path
):
    with pytest.raises(OutputError, match="there is no folder for"):
        selecting.select(named(models, "one"), families(), tmp_path / "none" / "out.yml")
    (tmp_path / "out.yml").write_text("mine")
    with pytest.raises(OutputError, match=r"out.yml exists"):
        selecting.select(named(models, "one"), families(), tmp_path / "out.yml")


def test_experts_of_one_architecture_are_searched_and_the_ranking_is_kept(
    models, families, scored, tmp_path
):
    scored({"one": (1.0, 0.0), "two": (0.0, 1.0)})
    out = tmp_path / "selected.yml"
    one, two = named(models, "one", "two")
    found = selecting.select([one, two], families(base=str(models / "base")), out)
    assert found.command == f"mergekit-unconstrained search {out} OUT"
    assert [m["model"] for m in yaml.safe_load(out.read_text())["recipe"]["models"]] == [one, two]
    saved = json.loads((tmp_path / "selected.scores.json").read_text(encoding="utf-8"))
    assert saved["picked"] == {"mathematics": one, "code": two}
    assert saved["pivot"] == two  # the mean over families counts a family once
    assert saved["families"]["mathematics"] == ["sums", "more"]
    assert saved["models"][one] == {
        "mathematics": {"mean": 0.5, "standard_error": 0.0, "n": 2},
        "code": {"mean": 0.0, "standard_error": 0.0, "n": 1},
    }


def test_a_search_finds_the_files_of_its_tasks(models, families, scored, write_tasks, tmp_path):
    scored({"one": (1.0, 0.0), "two": (0.0, 1.0)})
    file = families(base=str(models / "base"))
    (tmp_path / "own.yaml").write_text("task: own\n")
    data = {"kind": "exact", "data": {"search": "rows.jsonl"}}
    own = {"kind": "harness", "task": "own.yaml"}
    write_tasks({"sums": data, "more": {"kind": "harness", "task": "gsm8k"}, "programs": own})
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "elsewhere" / "out.yml"
    selecting.select(named(models, "one", "two"), file, out)
    tasks = yaml.safe_load(out.read_text())["tasks"]
    assert tasks["sums"]["data"] == {"search": str(tmp_path / "rows.jsonl")}
    assert tasks["more"]["task"] == "gsm8k"
    assert tasks["programs"]["task"] == str(tmp_path / "own.yaml")


def test_a_fusion_says_its_numbers_and_what_they_are(models, families, scored, tmp_path):
    scored({"one": (1.0, 0.0), "other": (0.0, 1.0)})
    (tmp_path / "data.jsonl").write_text("{}\n")
    out, data = tmp_path / "out.yml", str(tmp_path / "data.jsonl")
    selecting.select(named(models, "one", "other"), families(dataset=data), out)
    text = out.read_text()
    document, _, method = jobs.load_recipe(str(out))
    assert compat.is_ours(method)
    check_recipe(document, method)
    defaults = {spec.name: spec.default for spec in method.spec.shared_parameters}
    written = yaml.safe_load(text)["parameters"]
    assert written == {
        "dataset": data,
        **{key: defaults[key] for key in ("epochs", "learning_rate", "lora_rank")},
    }
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert "defaults" in " ".join(header)
    for name in ("epochs", "learning_rate", "lora_rank"):
        assert any(line.startswith(f"#   {name}: ") for line in header)


def test_one_model_that_is_best_of_all_is_told_with_the_families_that_count(
    models, families, scored, tmp_path
):
    scored({"one": (1.0, 1.0), "two": (0.0, 0.0)})
    out = tmp_path / "out.yml"
    told = r"every family that counts \(mathematics, code\).*`experts` in .*families.yml"
    with pytest.raises(RecipeError, match=told):
        selecting.select(named(models, "one", "two"), families(base=str(models / "base")), out)
    assert (tmp_path / "out.scores.json").is_file()  # the ranking is not lost
    assert not out.exists()
