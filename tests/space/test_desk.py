"""What happens on the page, without the page."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from mergekit_unconstrained.errors import UnconstrainedError
from mergekit_unconstrained.space import commands, desk, views
from mergekit_unconstrained.space.desk import SLIDERS, Desk, Settings, chosen

SETTINGS = ("ties", 1.5, "float32", " my/data ", 7)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def space(tmp_path, models_dir):
    made = Desk(Settings(tmp_path / "work", models_dir))
    yield made
    made.jobs.close()


def merge(space: Desk):
    found = space.verdict("llama/base", ["llama/expert1", "llama/expert2"])
    assert found is not None
    return found


def test_sliders_become_the_recipe_the_picture_and_the_cost(space):
    found = merge(space)
    one = (0.0, 0.3, 0.9, 1.0, 1.0, 1.0, 0.5, 0.2)
    two = (0.25,) * (SLIDERS - 1) + (1.0,)
    state = chosen(found, SETTINGS, (*one, *two))
    view = space.view(state, found)
    assert (view.problem, view.here) == ("", True)
    data = yaml.safe_load(view.recipe)
    assert data["dtype"] == "float32"
    assert data["parameters"]["operator"] == "ties"
    assert data["parameters"]["lambda"] == 1.5
    table = yaml.safe_load(data["parameters"]["coefficients"])
    assert table["experts"]["llama/expert1"]["layers"][3] == {"attention": 0.9, "mlp": 1.0}
    assert table["experts"]["llama/expert1"]["default"] == {"weight": 0.5, "density": 0.2}
    assert table["experts"]["llama/expert2"] == {"default": 0.25}
    assert view.picture is not None
    assert view.picture.startswith(PNG)
    assert 'src="data:image/png;base64,' in views.heat_map(view)


def test_what_is_too_big_gets_commands_instead(space):
    found = merge(space)
    space.settings = dataclasses.replace(space.settings, limit=1000)
    state = chosen(found, SETTINGS, ())
    view = space.view(state, found)
    assert not view.here
    assert "at most" in view.why_not_here
    with pytest.raises(UnconstrainedError, match="at most"):
        next(space.run(state, found, "merged", "me", None))


def test_a_fusion_is_shown_and_not_run_here(space):
    found = space.verdict("llama/base", ["qwen2/expert1"])
    assert found is not None
    view = space.view(chosen(found, SETTINGS, ()), found)
    assert (view.problem, view.here, view.picture) == ("", False, None)
    data = yaml.safe_load(view.recipe)
    assert data["parameters"] == {"dataset": "my/data", "max_steps": 7}
    assert "GPU" in view.why_not_here


def test_a_mixture_draws_the_groups_that_are_merged(space):
    experts = ["llama/expert1", "qwen2/expert1", "qwen2/expert2"]
    found = space.verdict("llama/base", experts)
    assert found is not None
    assert "Bases of other groups" in space.view(chosen(found, SETTINGS, ()), found).problem
    found = space.verdict("llama/base", experts, ["qwen2/base"])
    assert found is not None
    sliders = (0.0, 0.5, 1.0) * 2 + (0.5, 1.0)
    view = space.view(chosen(found, SETTINGS, sliders * 3), found)
    assert view.problem == ""
    assert view.picture is not None


def test_nothing_is_said_while_too_little_is_chosen(space):
    assert space.verdict(None, []) is None
    assert space.verdict("llama/base", []) is None
    assert "Choose a base model" in views.verdict(None)


def test_a_merge_its_card_and_its_end(space, models_dir):
    found = merge(space)
    state = chosen(found, ("task_arithmetic", 1, "bfloat16", "", 0), ())
    with pytest.raises(UnconstrainedError, match="no finished merge"):
        space.card("me")
    *_, (job, seen) = space.run(state, found, "my-merge", "me", None)
    log = "\n".join(seen.lines)
    assert (seen.returncode, seen.fraction, job.succeeded) == (0, 1.0, True), log
    assert "my-merge" in log
    assert str(models_dir) not in log
    assert str(job.folder) not in log
    assert not (job.folder / "tmp").exists()
    assert job.out == space.settings.work_dir.resolve() / "results" / "my-merge"
    assert f"{job.out}</code> and stays" in views.progress(seen, kept=job.out)
    assert (job.out / "model.safetensors").is_file()
    card = space.card("me")
    assert card.startswith("# my-merge")
    assert "![" not in card
    with pytest.raises(UnconstrainedError, match="no finished merge"):
        space.card("somebody else")
    with pytest.raises(UnconstrainedError, match="sign in first"):
        space.push("me/merged", "me", None)
    assert "me/spaces" not in card
    pushed_as = space.card("me", "me/spaces", "v7")
    assert pushed_as.startswith("# spaces")
    assert "me/spaces" in pushed_as
    assert "v7" in pushed_as
    assert space.card("me", "no/such/name", "v7") == card
    assert space.licence("me", "me/spaces").status == "clear"
    (job.out / "README.md").write_text("# By hand\n")
    assert space.card("me", "me/spaces") == "# By hand\n"
    space.jobs.leave("me")
    assert not job.folder.exists()
    assert (job.out / "model.safetensors").is_file()


def test_a_public_push_that_is_stopped_names_the_box_and_lists_why(space):
    found = space.verdict("llama/base", ["qwen2/expert1", "qwen2/expert2"])
    assert found is not None
    assert not found.licence.may_be_public
    told = views.not_public(found.licence, False)
    assert "<strong>The licences need a look before this is public" in told
    assert "tick “I have checked the licences”" in told
    assert told.count("<li>") == len(found.licence.reasons) > 0
    assert "--" not in told
    assert views.not_public(found.licence, True) == ""
    refused = dataclasses.replace(found.licence, status="refused")
    assert "forbid" in views.not_public(refused, True)
    assert "tick" not in views.not_public(refused, False)


def test_an_error_on_the_page_is_a_sentence():
    assert ">Sign in first: x<" in views.failure(UnconstrainedError("sign in first: x"))
    assert ">me/x is taken<" in views.failure(UnconstrainedError("me/x is taken"))


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x" * 97, ".hidden", "a\nb", "-rf"])
def test_a_result_has_a_plain_name(name):
    with pytest.raises(UnconstrainedError, match="no name for a result"):
        desk.checked_result(name)


def test_somebodys_own_recipe_is_planned_like_any_other(space):
    text = (
        "merge_method: layerwise\nbase_model: llama/base\n"
        "models: [{model: llama/expert1, parameters: {weight: 0.5, density: 0.5}}]\n"
    )
    with pytest.raises(UnconstrainedError, match="llama/nowhere"):
        space.own(text.replace("expert1", "nowhere"), "me", None)
    found, state = space.own(text, "me", None)
    view = space.view(state, found)
    assert "density" in view.problem  # means nothing to task_arithmetic
    found, state = space.own(text + "parameters: {operator: ties}\n", "me", None)
    view = space.view(state, found)
    assert (view.problem, view.here) == ("", True)
    assert view.recipe.endswith("{operator: ties}\n")


def test_the_script_of_a_job_cannot_be_broken_out_of():
    recipe = 'a: \'"""\\nimport os  # \\N{BULLET} {x}\'\n'
    script = commands.job_script(recipe, "merged", "me/merged")
    lines: dict[str, object] = {"json": json}
    for line in script.splitlines():
        if line.split(" = ")[0] in ("RECIPE", "OUT", "REPOSITORY"):
            exec(line, lines)
    assert (lines["RECIPE"], lines["OUT"], lines["REPOSITORY"]) == (recipe, "merged", "me/merged")
    compile(script, "merge_job.py", "exec")


def test_commands_are_quoted(space):
    found = merge(space)
    terminal, job, script = space.commands(chosen(found, SETTINGS, ()), "merged", "me/merged")
    assert "mergekit-yaml recipe.yml merged" in terminal
    assert "push merged me/merged --private" in terminal
    assert job.startswith("hf jobs uv run --flavor cpu-xl")
    assert "me/merged" in script
    with pytest.raises(UnconstrainedError):
        space.commands(chosen(found, SETTINGS, ()), "merged", "me/x; rm -rf /")


def test_hostile_words_are_text_on_the_page(space):
    found = merge(space)
    bad = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    models = tuple(dataclasses.replace(m, name=bad, licence=bad) for m in found.models)
    groups = tuple(dataclasses.replace(g, base=bad, experts=(bad,)) for g in found.groups)
    hostile = dataclasses.replace(
        found, models=models, groups=groups * 2, reasons=(bad,), problems=(bad,)
    )
    for html in (views.verdict(hostile), views.message(bad, "bad"), views.pushed(bad)):
        assert "<script" not in html
        assert "<img" not in html
        assert "&lt;script&gt;" in html or "Pushed." in html
    assert "javascript" not in views.pushed("javascript:alert(1)")


def test_a_card_keeps_its_code_and_loses_its_pictures():
    text = "---\na: 1\n---\n# T\n\n![x](a.png)\n\n````md\n![kept](b.png)\n```\n````\nend\n"
    body = desk.card_body(text)
    assert body == "# T\n\n\n````md\n![kept](b.png)\n```\n````\nend\n"


def test_an_empty_list_says_how_models_get_there(tmp_path):
    assert "--models-dir FOLDER" in views.no_models(tmp_path, hosted=False)
    assert str(tmp_path) not in views.no_models(tmp_path, hosted=True)
    assert desk.Settings(tmp_path, tmp_path, hosted=True).results is None
