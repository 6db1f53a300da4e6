"""The life of a job: staging, restarts after a kill, what a finished folder holds."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mergekit_unconstrained.cli import main
from mergekit_unconstrained.engine import staging
from mergekit_unconstrained.engine.digest import sha256
from mergekit_unconstrained.errors import OutputError
from tests.conftest import TinyModels


def test_a_folder_gets_its_name_only_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staging.staged(out, "job") as partial:
        (partial / "weights").write_text("x")
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["weights"]
    assert not partial.exists()


def test_an_error_leaves_neither_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="boom"), staging.staged(out, "job"):
        raise ValueError("boom")
    assert list(tmp_path.iterdir()) == []


def _killed_while_writing(out: Path) -> None:
    with staging.staged(out, "job") as partial:
        (partial / "weights").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def _kill(out: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_killed_while_writing, args=(out,)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_after_a_kill_the_same_job_starts_afresh_and_another_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _kill(out)
    assert not out.exists()
    with pytest.raises(OutputError, match="left by another recipe"), staging.staged(out, "other"):
        pass
    assert (staging.partial_of(out) / "weights").read_text() == "half"
    with staging.staged(out, "job") as partial:
        assert not (partial / "weights").exists()
    assert out.exists()


def test_a_partial_folder_that_is_not_ours_is_never_removed(tmp_path: Path) -> None:
    precious = tmp_path / "out.partial" / "precious"
    precious.parent.mkdir()
    precious.write_text("x")
    with pytest.raises(OutputError, match="something else"), staging.staged(tmp_path / "out", "j"):
        pass
    assert precious.exists()


def test_two_runs_at_a_time_do_not_meet(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    with (
        staging.staged(out, "job") as partial,
        pytest.raises(OutputError, match="another run is writing"),
        staging.staged(out, "job"),
    ):
        pass
    assert out.exists()
    assert not partial.exists()


def recipe_for(models: TinyModels, **changes: Any) -> dict[str, Any]:
    return {
        "merge_method": "layerwise",
        "base_model": str(models.base),
        "models": [
            {"model": str(m), "parameters": {"weight": w}}
            for m, w in zip(models.experts, (0.5, 0.3, 0.2), strict=True)
        ],
        "dtype": "bfloat16",
        **changes,
    }


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_finished_folder_explains_itself(here: Path, tiny_models: TinyModels) -> None:
    names = [m.name for m in tiny_models.experts]
    table = {"layers": 4, "experts": {n: {"default": 0.1, "layers": {2: 0.7}} for n in names}}
    Path("table.yml").write_text(yaml.safe_dump(table))
    recipe = recipe_for(tiny_models, parameters={"coefficients": "table.yml"})
    Path("recipe.yml").write_text("# why: a test\n" + yaml.safe_dump(recipe, sort_keys=False))
    output = invoke("yaml", "recipe.yml", "out")
    assert "3 experts merged by layerwise" in " ".join(output.split())

    held = {p.name for p in Path("out").iterdir()}
    assert {"README.md", "mergekit_config.yml", "coefficients.yml", "coefficients.png"} <= held
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= held
    assert "job.json" not in held
    assert Path("out/coefficients.yml").read_text() == Path("table.yml").read_text()
    pinned = Path("out/mergekit_config.yml").read_text()
    assert "# why: a test" in pinned  # comments survive
    assert yaml.safe_load(pinned)["parameters"]["coefficients"] == "coefficients.yml"

    card = Path("out/README.md").read_text()
    assert sha256(tiny_models.experts[0] / "model.safetensors") in card
    assert sha256(Path("out/model.safetensors")) in card
    everything = card + pinned + Path("out/coefficients.yml").read_text()
    assert str(tiny_models.base.parent) not in everything
    assert str(here) not in everything
    assert str(Path.home()) not in everything


def test_the_recipe_in_a_finished_folder_runs_again(here: Path, tiny_models: TinyModels) -> None:
    for model in (tiny_models.base, *tiny_models.experts):
        Path(model.name).symlink_to(model)
    recipe = recipe_for(TinyModels(Path("base"), tuple(Path(m.name) for m in tiny_models.experts)))
    Path("recipe.yml").write_text(yaml.safe_dump(recipe))
    invoke("yaml", "recipe.yml", "out")
    invoke("yaml", "out/mergekit_config.yml", "again")
    assert sha256(Path("out/model.safetensors")) == sha256(Path("again/model.safetensors"))


def test_a_dry_run_prints_the_plan_and_writes_nothing(here: Path, tiny_models: TinyModels) -> None:
    Path("recipe.yml").write_text(yaml.safe_dump(recipe_for(tiny_models)))
    output = invoke("yaml", "recipe.yml", "out", "--dry-run")
    assert "39 tensors" in output
    assert sorted(p.name for p in here.iterdir()) == ["recipe.yml"]


def test_the_plan_tells_sizes_and_coefficients(here: Path, tiny_models: TinyModels) -> None:
    recipe = recipe_for(tiny_models)
    recipe["models"][0]["parameters"]["weight"] = [0.1, 0.9]
    Path("recipe.yml").write_text(yaml.safe_dump(recipe))
    output = " ".join(invoke("plan", "recipe.yml", "--out", "out").split())
    assert "0.1 to 0.9" in output
    assert "39 tensors, 4 layers" in output
    assert "free" in output


def test_coefficients_can_be_made_shown_drawn_and_run(here: Path, tiny_models: TinyModels) -> None:
    models = [str(m) for m in (tiny_models.base, *tiny_models.experts)]
    for start in ("uniform", "energy", "depth"):
        invoke("coefficients", "init", *models, "--from", start, "--out", f"{start}.yml")
        recipe = recipe_for(tiny_models, parameters={"coefficients": f"{start}.yml"})
        for model in recipe["models"]:
            del model["parameters"]
        Path(f"{start}-recipe.yml").write_text(yaml.safe_dump(recipe))
        assert "all right" in invoke("check", f"{start}-recipe.yml")
    assert "expert1" in invoke("coefficients", "show", "depth-recipe.yml")
    invoke("coefficients", "plot", "depth-recipe.yml", "picture.png")
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
    invoke("yaml", "depth-recipe.yml", "out")


def test_an_upstream_recipe_runs_untouched_by_our_command(
    here: Path, tiny_models: TinyModels
) -> None:
    recipe = recipe_for(tiny_models, merge_method="task_arithmetic", no_such_key=1)
    Path("recipe.yml").write_text(yaml.safe_dump(recipe))
    invoke("yaml", "recipe.yml", "out", "--no-write-model-card")
    assert Path("out/model.safetensors").exists()
    result = CliRunner().invoke(main, ["check", "recipe.yml"])
    assert result.exit_code == 1
    assert "mergekit's own method" in " ".join(result.output.split())


def test_no_card_is_written_where_none_is_wanted(here: Path, tiny_models: TinyModels) -> None:
    Path("recipe.yml").write_text(yaml.safe_dump(recipe_for(tiny_models)))
    invoke("yaml", "recipe.yml", "out", "--no-write-model-card")
    assert not Path("out/README.md").exists()
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 4


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_folder_that_cannot_be_renamed_to_is_refused(out: str) -> None:
    with pytest.raises(OutputError, match="choose one"):
        staging.check_out(Path(out))


def merged_by(method: str, models: TinyModels, **parameters: Any) -> Path:
    recipe = {
        "merge_method": method,
        "base_model": str(models.base),
        "models": [{"model": str(m)} for m in models.experts[:2]],
        "parameters": parameters,
    }
    Path("recipe.yml").write_text(yaml.safe_dump(recipe))
    invoke("yaml", "recipe.yml", method, "--quiet")
    return Path(method)


@pytest.mark.parametrize(("method", "is_drawn"), [("lines", False), ("dare_exact", True)])
def test_weights_are_drawn_only_where_they_say_what_an_expert_counts_for(
    here: Path,
    tiny_models: TinyModels,
    method: str,
    is_drawn: bool,
) -> None:
    """`lines` scales the layers besides, so that equal weights are no equal shares."""
    out = merged_by(method, tiny_models)
    assert (out / "coefficients.png").exists() == is_drawn
    assert ("What every expert counts for" in (out / "README.md").read_text()) == is_drawn


@pytest.mark.usefixtures("here")
def test_what_a_recipe_leaves_to_the_defaults_is_kept(tiny_models: TinyModels) -> None:
    out = merged_by("consensus", tiny_models, min_agreement=1)
    method = json.loads((out / "provenance.json").read_text())["method"]
    assert method["parameters"] == {"min_agreement": 1}
    assert method["defaults"]["lambda"] == 0.3
    assert "min_agreement" not in method["defaults"]
    assert "Left at the defaults: " in (out / "README.md").read_text()


@pytest.mark.usefixtures("here")
def test_a_subspace_without_a_dimension_is_refused(tiny_models: TinyModels) -> None:
    recipe = {
        "merge_method": "doge",
        "base_model": str(tiny_models.base),
        "models": [{"model": str(m)} for m in tiny_models.experts[:2]],
        "parameters": {"subspace": 100_000},
    }
    Path("recipe.yml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(main, ["check", "recipe.yml"])
    assert result.exit_code == 1
    assert "one of 100000 dimensions of model.layers.0" in result.output + str(result.exception)
