"""provenance.json: what it holds, that a flipped byte is found, and that a folder is made again."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from click.testing import CliRunner, Result
from huggingface_hub.hf_api import BlobLfsInfo, RepoFile

from mergekit_unconstrained.cli import main
from mergekit_unconstrained.compat import ModelReference
from mergekit_unconstrained.config.parents import read_parent
from mergekit_unconstrained.engine.digest import sha256
from mergekit_unconstrained.errors import OutputError
from mergekit_unconstrained.hub import provenance, sources
from mergekit_unconstrained.hub.pinning import pinned_name, places, portable
from tests.conftest import TinyModels

COMMIT = "12fd25f77366fa6b3b4b768ec3050bf629380bac"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def said(result: Result) -> str:
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def merged(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, a recipe in which one is named absolutely, and the result in `out`."""
    folder = tmp_path_factory.mktemp("merged")
    (folder / "models").mkdir()
    for model in (tiny_models.base, *tiny_models.experts[:2]):
        shutil.copytree(model, folder / "models" / model.name)
    card = "---\nlicense: apache-2.0\nlanguage: en\n---\n"
    (folder / "models/base/README.md").write_text(card)
    table = {"layers": 4, "experts": {"expert1": {"default": 0.4}, "expert2": {"default": 0.2}}}
    (folder / "table.yml").write_text(yaml.safe_dump(table))
    recipe = {
        "merge_method": "layerwise",
        "base_model": str(folder / "models/base"),
        "models": [{"model": "models/expert1"}, {"model": "./models/expert2"}],
        "parameters": {"coefficients": "table.yml"},
        "dtype": "bfloat16",
    }
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = run("yaml", "recipe.yml", "out", "--quiet")
    finally:
        os.chdir(before)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def here(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `merged` to spoil."""
    shutil.copytree(merged, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def flip(file: Path, place: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


# -- what it holds --------------------------------------------------------------------------------


def test_it_holds_everything_that_went_in_and_came_out(merged: Path) -> None:
    known = provenance.load(merged / "out")
    base, *experts = known.parents
    assert (base.role, base.model.licence, base.model.languages) == ("base", "apache-2.0", ("en",))
    assert base.model.files[0].sha256 == sha256(merged / "models/base/model.safetensors")
    assert base.model.tokenizer == sha256(merged / "models/base/tokenizer.json")
    assert base.architecture == "LlamaForCausalLM"
    assert [p.model.place for p in known.parents] == ["base", "models/expert1", "./models/expert2"]
    assert known.weights["expert1"]["q"] == [0.4] * 4
    assert known.weights["expert2"]["head"] == [0.2]
    assert [p.weight for p in experts] == ["0.4", "0.2"]
    names = {f.name: f for f in known.files}
    assert names.keys() >= {"config.json", "coefficients.yml", "mergekit_config.yml"}
    assert not names.keys() & {"README.md", "provenance.json", "job.json"}
    for name, file in names.items():
        assert file.sha256 == sha256(merged / "out" / name)
        assert file.size == (merged / "out" / name).stat().st_size
    assert known.versions["mergekit-unconstrained"]
    assert known.machine["cores"] == str(os.cpu_count())
    assert known.seconds > 0


def test_nothing_of_this_machine_is_in_it(merged: Path) -> None:
    for name in ("provenance.json", "README.md", "mergekit_config.yml"):
        text = (merged / "out" / name).read_text()
        for secret in (str(merged), str(Path.home()), os.uname().nodename, str(Path.cwd())):
            assert secret not in text, name


def test_a_card_is_made_again_from_the_folder_alone(here: Path) -> None:
    shutil.move("out", "moved")
    shutil.rmtree("models")
    before = Path("moved/README.md").read_text()
    kept = Path("moved/provenance.json").read_bytes()
    Path("moved/README.md").unlink()
    result = run("card", "moved")
    assert result.exit_code == 0, result.output
    assert Path("moved/README.md").read_text() == before
    assert Path("moved/provenance.json").read_bytes() == kept
    assert "not legal advice" in said(result)


def test_the_recipe_and_table_on_a_card_give_the_same_weights(here: Path) -> None:
    """Nothing is rounded on the way to the card: what is copied from it is what was merged."""
    table = Path("table.yml")
    odd = {"expert1": {"default": 0.1 + 0.2}, "expert2": {"default": 1 / 3}}
    table.write_text(yaml.safe_dump({"layers": 4, "experts": odd}))
    made = run("yaml", "recipe.yml", "exact", "--quiet")
    assert made.exit_code == 0, made.output
    card = Path("exact/README.md").read_text()
    found = re.findall(r"^```yaml\n(.*?)^```$", card, re.M | re.S)
    coefficients, recipe = found
    assert "0.30000000000000004" in coefficients
    Path("copied").mkdir()
    Path("copied/coefficients.yml").write_text(coefficients)
    Path("copied/mergekit_config.yml").write_text(recipe)
    for model in Path("models").iterdir():
        shutil.copytree(model, Path("copied/models") / model.name)
    shutil.copytree("models/base", "copied/base")
    os.chdir("copied")
    again = run("yaml", "mergekit_config.yml", "again", "--quiet")
    assert again.exit_code == 0, again.output
    (shown,) = re.findall(r"^([0-9a-f]{64})  model.safetensors$", card, re.M)
    assert sha256(Path("again/model.safetensors")) == shown


def test_a_card_learns_where_its_model_is(here: Path) -> None:
    result = run("card", "out", "--repo", "org/name", "--tag", "v1", "--quantised", "org/name-gguf")
    assert result.exit_code == 0, result.output
    for _ in range(2):
        text = Path("out/README.md").read_text()
        assert 'model_id = "org/name"\nrevision = "v1"' in text
        assert "https://huggingface.co/org/name-gguf" in text
        assert run("card", "out").exit_code == 0  # and keeps it
    assert run("verify", "out").exit_code == 0
    for wrong in ("name", "../x/y", "a b/c"):
        assert run("card", "out", "--repo", wrong).exit_code == 2


def test_a_template_of_ones_own_is_used(here: Path) -> None:
    Path("own.j2").write_text("{{ facts.title | md }} by {{ facts.method.name | code }}")
    assert run("card", "out", "--template", "own.j2").exit_code == 0
    assert Path("out/README.md").read_text() == "out by `layerwise`\n"


def test_densities_are_kept_where_something_is_thinned(here: Path) -> None:
    table = {
        "layers": 4,
        "experts": {
            "expert1": {"default": {"weight": 0.4, "density": 0.5}},
            "expert2": {"default": 0.2},
        },
    }
    Path("table.yml").write_text(yaml.safe_dump(table))
    recipe = yaml.safe_load(Path("recipe.yml").read_text())
    recipe["parameters"]["operator"] = "ties"
    Path("thin.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    result = run("yaml", "thin.yml", "thin", "--quiet")
    assert result.exit_code == 0, result.output
    assert [p.density for p in provenance.load(Path("thin")).parents][:2] == ["", "0.5"]
    assert "| Weight | Density |" in Path("thin/README.md").read_text()
    assert {p.density for p in provenance.load(Path("out")).parents} == {""}


def scores(*models: str) -> str:
    task = {"mean": 0.5, "standard_error": 0.1, "n": 20, "failures": 0}
    found = {model: {"mean": 0.5, "tasks": {"sums": task}} for model in models}
    tasks = {"sums": {"unit": "exact match", "weight": 1, "solved_at": 1}}
    return json.dumps({"split": "test", "tasks": tasks, "models": found, "keys": {}})


def test_scores_are_brought_into_the_card_under_public_names(here: Path) -> None:
    Path("scores").mkdir()
    Path("scores/scores.json").write_text(scores(str(here / "out"), str(here / "models/base")))
    assert run("card", "out", "--scores", "scores").exit_code == 0
    text = Path("out/README.md").read_text()
    assert "| sums | exact match | this model | 0.5 | 0.1 | 20 |" in text
    assert "| sums | exact match | base | 0.5 | 0.1 | 20 |" in text
    assert "test split" in text
    assert str(here) not in text + Path("out/scores.json").read_text()
    assert run("verify", "out").exit_code == 0
    flip(Path("out/scores.json"), 5)
    assert "scores.json" in run("verify", "out").output
    Path("scores/scores.json").write_text(scores("models/base"))
    assert "none of out" in said(run("card", "out", "--scores", "scores"))
    Path("scores/scores.json").write_text("[]")
    assert "cannot be read" in said(run("card", "out", "--scores", "scores/scores.json"))


# -- verify ---------------------------------------------------------------------------------------


def test_a_flipped_byte_of_any_file_is_found(here: Path) -> None:
    assert run("verify", "out").exit_code == 0
    for name in [f.name for f in provenance.load(Path("out")).files]:
        file = Path("out") / name
        for place in (0, file.stat().st_size // 2, -1):
            flip(file, place)
            result = run("verify", "out")
            assert result.exit_code == 1
            assert f"{name}: has other contents (sha256 differs)" in said(result)
            flip(file, place)
    assert run("verify", "out").exit_code == 0


def test_a_missing_a_shorter_and_a_strange_file_are_found(here: Path) -> None:
    Path("out/config.json").unlink()
    weights = Path("out/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-10])
    Path("out/model-00002.safetensors").write_text("x")
    Path("out/README.md").write_text("a card may be written by hand")
    Path("out/.cache").mkdir()
    Path("out/.cache/x.bin").write_text("of the Hub's client")
    result = run("verify", "out")
    assert result.exit_code == 1
    problems = {p.file: p.what for p in provenance.verify(Path("out"))}
    assert problems.keys() == {"config.json", "model.safetensors", "model-00002.safetensors"}
    assert problems["config.json"] == "is missing"
    assert "instead of" in problems["model.safetensors"]


def test_provenance_itself_is_sealed(here: Path) -> None:
    file = Path("out/provenance.json")
    text = file.read_text()
    file.write_text(text.replace('"apache-2.0"', '"mit"'))
    assert "was changed after it was written" in said(run("verify", "out"))
    for wrong, message in (
        (text[:-40], "damaged"),
        (text.replace('"schema_version": 1', '"schema_version": 2'), "schema 2"),
        (text.replace('"mergekit_config.yml"', '"../recipe.yml"'), "not a path within"),
        (text.replace('"config.json"', '"/etc/passwd"'), "not a path within"),
        (text.replace('"title"', '"titel"'), "damaged"),
        ("[]", "damaged"),
        ("", "damaged"),
    ):
        file.write_text(wrong)
        result = run("verify", "out")
        assert (result.exit_code, isinstance(result.exception, SystemExit)) == (1, True)
        assert message in said(result)
    file.unlink()
    assert "has no provenance.json" in said(run("verify", "out"))
    assert run("verify", "nothing").exit_code == 2


def test_parents_are_checked_when_asked(here: Path) -> None:
    shutil.move("models/base", "elsewhere")
    result = run("verify", "out", "--parents")
    assert result.exit_code == 0
    assert "base is not here" in said(result)
    flip(Path("elsewhere/model.safetensors"))
    result = run("verify", "out", "--parent", "base=elsewhere")
    assert result.exit_code == 1
    assert "base/model.safetensors: has other contents" in said(result)
    assert "no local model or data" in said(run("verify", "out", "--parent", "bsae=elsewhere"))


@pytest.fixture
def hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The Hub as verify_repo sees it: org/name is `out`, its weights are known by hash alone."""

    def entry(path: Path) -> RepoFile:
        lfs = None
        if path.suffix == ".safetensors":
            size = path.stat().st_size
            lfs = BlobLfsInfo(size=size, sha256=sha256(path), pointer_size=1)
        file = RepoFile(path=path.name, size=path.stat().st_size, oid="0" * 40)
        file.lfs = lfs
        return file

    class Api:
        def model_info(self, repo_id: str, revision: str | None) -> Any:
            if repo_id != "org/name":
                raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled")
            return SimpleNamespace(sha=COMMIT)

        def list_repo_tree(self, repo_id: str, recursive: bool, revision: str) -> list[RepoFile]:
            assert revision == COMMIT
            return [entry(file) for file in Path("out").iterdir()]

    def download(repo_id: str, name: str, revision: str) -> str:
        assert revision == COMMIT
        assert not name.endswith(".safetensors"), "weights are not fetched"
        return str(Path("out") / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return lambda: None


def test_a_repository_is_checked_without_its_weights(hub: Any) -> None:
    assert "org/name: every file is as" in said(run("verify", "org/name"))
    flip(Path("out/model.safetensors"))
    flip(Path("out/config.json"))
    Path("out/tokenizer.json").unlink()
    Path("out/other.safetensors").write_text("x")
    result = run("verify", "org/name")
    assert result.exit_code == 1
    for name in ("model.safetensors", "config.json", "tokenizer.json", "other.safetensors"):
        assert f"{name}: " in result.output
    result = run("verify", "org/other")
    assert result.exit_code == 1
    assert "offline mode" in said(result)
    Path("out/provenance.json").unlink()
    assert "has no provenance.json" in said(run("verify", "org/name"))


# -- reproduce ------------------------------------------------------------------------------------


def test_a_folder_is_made_again_byte_for_byte(here: Path) -> None:
    shutil.move("models/base", "base")  # the recipe named it absolutely
    before = sorted(p.name for p in here.iterdir())
    result = run("reproduce", "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "everything that its recipe needs is here" in said(result)
    result = run("reproduce", "out")
    assert result.exit_code == 0, result.output
    assert "1 weight file equal byte for byte" in said(result)
    assert sorted(p.name for p in here.iterdir()) == before
    result = run("reproduce", "out", "again")
    assert result.exit_code == 0, result.output
    assert sha256(Path("again/model.safetensors")) == sha256(Path("out/model.safetensors"))
    assert "exists and is not empty" in said(run("reproduce", "out", "again"))


def test_models_are_found_where_one_says(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.move("models", "store")
    result = run("reproduce", "out")
    assert result.exit_code == 1
    assert "--parent base=PATH --parent models/expert1=PATH" in said(result)
    given = ["--parent", "base=store/base", "--parent", "expert1=store/expert1"]
    given += ["--parent", "./models/expert2=store/expert2"]
    assert run("reproduce", "out", *given).exit_code == 0
    Path("other").mkdir()
    monkeypatch.chdir("other")
    result = run("reproduce", "../out", *[a.replace("store", "../store") for a in given])
    assert result.exit_code == 0, result.output
    assert "no such file" in said(run("reproduce", "../out", "--parent", "base=nowhere"))
    assert run("reproduce", "../out", "--parent", "base").exit_code == 2


def test_other_parents_are_refused_before_the_run(here: Path) -> None:
    shutil.move("models/base", "base")
    flip(Path("models/expert1/model.safetensors"))
    result = run("reproduce", "out")
    assert result.exit_code == 1
    assert "expert1/model.safetensors: has other contents" in said(result)


def test_a_difference_is_named_by_its_tensor(here: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.move("models/base", "base")
    file = Path("out/model.safetensors")
    weights = load_file(file)
    weights["model.norm.weight"][3] += 0.5
    save_file(weights, file, {"format": "pt"})
    folder = Path("out")
    known = provenance.load(folder)
    provenance.save(folder, provenance.amended(folder, known, file.name))
    result = run("reproduce", "out")
    assert result.exit_code == 1
    assert "model.safetensors: model.norm.weight differs, by 0.5" in said(result)
    assert result.output.count("differs") == 1
    assert "was not reproduced" in said(result)


def test_a_record_cannot_ask_for_more_than_a_record_may(here: Path) -> None:
    shutil.move("models/base", "base")
    folder = Path("out")
    known = provenance.load(folder)
    for flags, message in (
        (("--trust-remote-code",), "code from its parents' repositories would run"),
        (("--lora-merge-cache", "/x"), "which no record holds"),
    ):
        provenance.save(folder, known.model_copy(update={"flags": flags}))
        assert message in said(run("reproduce", "out"))
    model = known.parents[0].model
    for place in ("../base", "/etc", "a/../../b"):
        changed = known.model_dump() | {"flags": ()}
        changed["parents"][0]["model"] = {**vars(model), "place": place}
        provenance.save(folder, provenance.Provenance.model_validate(changed))
        assert "not a path within the folder" in said(run("reproduce", "out"))


def test_reproducing_publishes_nothing(tmp_path: Path) -> None:
    from mergekit_unconstrained.jobs.reproducing import _publishes_nothing

    file = tmp_path / "settings.yml"
    kept = {"parameters": {"lambda": 1}, "training": {"max_grad_norm": 1.0}}
    asked = {"push_to_hub": "org/name", "hub_private": False}
    training = {"push_to_hub": True, "hub_model_id": "org/x", "max_grad_norm": 1.0}
    file.write_text(yaml.safe_dump({"parameters": {"lambda": 1, **asked}, "training": training}))
    _publishes_nothing(file)
    assert yaml.safe_load(file.read_text()) == kept
    file.write_text(text := "# a comment\nparameters: {lambda: 1}\n")
    _publishes_nothing(file)
    assert file.read_text() == text


# -- names ----------------------------------------------------------------------------------------


def test_two_models_of_one_name_stay_apart(tiny_models: TinyModels, tmp_path: Path) -> None:
    paths = []
    for run_name, model in zip(("one", "two"), tiny_models.experts, strict=False):
        paths.append(tmp_path / run_name / "checkpoint-10")
        shutil.copytree(model, paths[-1])
    parents = [read_parent(ModelReference.parse(str(path))) for path in paths]
    names = places(parents)
    assert list(names.values()) == ["checkpoint-10", "checkpoint-10-2"]
    assert [pinned_name(p, names) for p in parents] == ["checkpoint-10", "checkpoint-10-2"]
    shown = [sources.source_of(p, names) for p in parents]
    assert [s.name for s in shown] == ["checkpoint-10", "checkpoint-10-2"]
    assert [s.place for s in shown] == ["checkpoint-10", "checkpoint-10-2"]


def test_a_folder_of_the_hubs_cache_is_the_model_at_its_commit(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    folder = tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT
    shutil.copytree(tiny_models.base, folder)
    parent = read_parent(ModelReference.parse(str(folder)))
    names = places([parent])
    assert pinned_name(parent, names) == f"org/name@{COMMIT}"
    source = sources.source_of(parent, names)
    assert (source.hub_id, source.commit, source.place) == ("org/name", COMMIT, None)


def test_a_model_fetched_during_the_merge_has_its_commit(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    repository = tmp_path / "models--org--name"
    shutil.copytree(tiny_models.base, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    here = read_parent(ModelReference.parse(str(tiny_models.base)))
    reference = ModelReference.parse("org/name")
    before = dataclasses.replace(here, reference=reference, folder=None, weight_files=())
    (repository / "snapshots" / COMMIT / "tokenizer_config.json").unlink()  # not all was fetched
    (after,) = sources.resolved([before], str(tmp_path))
    assert after.commit == COMMIT
    assert pinned_name(after) == f"org/name@{COMMIT}"
    source = sources.source_of(after, places([after]))
    assert source.files[0].sha256 == sha256(tiny_models.base / "model.safetensors")
    (lost,) = sources.resolved([before], str(tmp_path / "elsewhere"))
    assert lost.commit is None


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("models/a", "models/a"),
        ("a/../../b", "b"),
        ("../b", "b"),
        ("~/b", "b"),
        ("/x/y/b/", "b"),
        ("org/name", "org/name"),
    ],
)
def test_what_the_pinned_recipe_calls_a_path(path: str, shown: str) -> None:
    assert portable(path) == shown


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/../../b", "a\\b", "C:x", "~/a", "a\0b"])
def test_a_record_names_files_within_its_folder(name: str) -> None:
    with pytest.raises(ValueError, match="not a path within"):
        provenance.inside(name)


def test_a_folder_without_provenance_says_so(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="older release"):
        provenance.load(tmp_path)
