"""`push_to_hub` in a recipe: asked before the work, pushed behind it, gone on with by the same
command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from click.testing import CliRunner, Result
from huggingface_hub import HfApi

from mergekit_unconstrained.cli import main
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.hub import publication
from mergekit_unconstrained.jobs import publishing
from tests.conftest import TinyModels
from tests.hub.conftest import Clock
from tests.hub_stand_in import HubStandIn

REPO = "alice/merged"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """No wait between two tries is a real one."""
    monkeypatch.setattr(publishing, "Patience", lambda tell: clock.patience)


@pytest.fixture
def recipe(
    hub: HubStandIn, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """`recipe(hub_tag="v1")`: a file in the current directory; `method`: another one of ours."""
    monkeypatch.chdir(tmp_path)

    def write(method: str = "layerwise", **parameters: Any) -> Path:
        data = {
            "merge_method": method,
            "base_model": str(tiny_models.base),
            "models": [
                {"model": str(m), "parameters": {"weight": 0.5}} for m in tiny_models.experts[:2]
            ],
            "parameters": {
                k: v for k, v in {"push_to_hub": REPO, **parameters}.items() if v is not None
            },
            "dtype": "bfloat16",
        }
        path = tmp_path / "recipe.yml"
        path.write_text("# ours\n" + yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
        return path

    return write


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def merge(path: Path) -> Result:
    return run("yaml", path, "out")


def logits(place: str | Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(place)(torch.tensor([[5, 6, 7]])).logits


@pytest.mark.parametrize("method", ["layerwise", "unconstrained"])
def test_a_cut_after_the_commit_and_the_same_command_give_one_commit(
    hub: HubStandIn, recipe: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    import torch

    path = recipe(method, hub_tag="v1")
    hub.cut("commit", "after")
    away = hub.fail("info", 503, skip=3, times=999)  # after before, made and before the push
    first = merge(path)
    assert first.exit_code == 1
    assert away.hits
    assert "out is complete and stays, but: cannot" in first.output
    assert "run the same command again" in first.output
    assert len(hub.commits(REPO)) == 2  # it arrived, and nobody knows
    hub.faults.clear()
    before = {p: p.stat().st_mtime_ns for p in Path("out").glob("*.safetensors")}
    second = merge(path)
    assert second.exit_code == 0, second.output
    assert "all of it was there already" in second.output
    assert {p: p.stat().st_mtime_ns for p in Path("out").glob("*.safetensors")} == before
    assert len(hub.commits(REPO)) == 2
    assert hub.repo(REPO).refs["refs/tags/v1"] == hub.commits(REPO)[0].sha
    assert hub.repo(REPO).private
    there = huggingface_hub.snapshot_download(REPO, revision="v1")
    assert torch.equal(logits("out"), logits(there))
    assert run("verify", "out").exit_code == 0
    assert run("verify", REPO, "--revision", "v1").exit_code == 0
    for text in (p.read_text() for p in Path(there).iterdir() if p.suffix in (".md", ".yml")):
        assert "push_to_hub" not in text
        assert str(tmp_path) not in text
    card = (Path(there) / "README.md").read_text()
    assert REPO in card
    assert "v1" in card


def test_the_token_is_asked_about_before_anything_is_merged(
    hub: HubStandIn, recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    result = merge(recipe())
    assert result.exit_code == 1
    assert "may only read" in result.output
    monkeypatch.delenv("HF_TOKEN")
    result = merge(recipe())
    assert "there is no token. Run `hf auth login`" in " ".join(result.output.split())
    monkeypatch.setenv("HF_TOKEN", hub.token)
    result = merge(recipe(push_to_hub="bob/merged"))
    assert "bob is neither it nor one of its organisations" in " ".join(result.output.split())
    assert not [p for p in Path.cwd().iterdir() if p.name.startswith("out")]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"push_to_hub": 3}, "recipe.yml:12: parameters.push_to_hub: must be a name"),
        ({"push_to_hub": "a/b/c"}, "that is no name of a repository"),
        ({"push_to_hub": "alice/--x"}, "that is no name of a repository"),
        ({"hub_private": "no"}, "parameters.hub_private: must be true or false"),
        ({"hub_tag": "../v1"}, "is no name for a tag"),
        ({"push_to_hubb": "alice/x"}, "Did you mean 'push_to_hub'"),
        ({"push_to_hub": None, "hub_tag": "v1"}, "`hub_tag` needs `push_to_hub: org/name`"),
        ({"hub_private": False}, "the licences need a look before this is public (review)"),
    ],
)
def test_what_cannot_be_meant_is_said_before_the_merge(
    hub: HubStandIn, recipe: Callable[..., Path], parameters: dict[str, Any], message: str
) -> None:
    result = merge(recipe(**parameters))
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert not Path("out").exists()
    assert not hub.seen("commit")


def test_another_recipe_does_not_publish_what_is_there(
    hub: HubStandIn, recipe: Callable[..., Path]
) -> None:
    hub.fail("lfs-batch", 403, times=99)
    assert "has no right to" in " ".join(merge(recipe()).output.split())
    hub.faults.clear()
    data = yaml.safe_load(Path("recipe.yml").read_text())
    data["models"][0]["parameters"]["weight"] = 0.4
    Path("recipe.yml").write_text(yaml.safe_dump(data, sort_keys=False))
    result = merge(Path("recipe.yml"))
    assert "exists and is not empty" in result.output
    assert len(hub.commits(REPO)) == 1
    # a tag, or another place, makes no other model
    result = merge(recipe(push_to_hub="acme/merged", hub_tag="v2"))
    assert result.exit_code == 0, result.output
    assert len(hub.commits("acme/merged", "v2")) == 2


def test_a_dry_run_asks_nothing_and_the_options_are_known_to_check(
    hub: HubStandIn, recipe: Callable[..., Path]
) -> None:
    path = recipe(dry_run=True)
    assert merge(path).exit_code == 0
    assert run("check", path).exit_code == 0
    assert hub.requests == []


def test_a_finished_folder_remembers_its_job_and_does_not_publish_that(
    hub: HubStandIn, recipe: Callable[..., Path]
) -> None:
    assert merge(recipe()).exit_code == 0
    note = publication.read(Path("out"))
    assert (note["repo"], note["commit"]) == (REPO, hub.commits(REPO)[0].sha)
    assert publication.NOTE not in hub.commits(REPO)[0].files
    assert hub.content(REPO, "provenance.json") == Path("out/provenance.json").read_bytes()
    assert json.loads(Path("out/provenance.json").read_text())["repo_id"] == REPO
    again = merge(recipe())
    assert again.exit_code == 0, again.output
    assert len(hub.commits(REPO)) == 2


def test_a_recipe_loses_its_keys_and_keeps_its_comments() -> None:
    text = (
        "# first\na: 1\nparameters:\n  x: 1 # why\n  push_to_hub: a/b # where\n  y: [1,\n    2]\n"
    )
    found = publishing.without_keys(Document.parse(text, "r.yml"))
    assert found.text == text.replace("  push_to_hub: a/b # where\n", "")
    flow = Document.parse("a: 1\nparameters: {push_to_hub: a/b, hub_tag: v1, x: 2}\n", "r.yml")
    assert publishing.without_keys(flow).data == {"a": 1, "parameters": {"x": 2}}
    block = Document.parse("parameters:\n  push_to_hub: >-\n    a/b\n  x: 1\nz: 1\n", "r.yml")
    assert publishing.without_keys(block).data == {"parameters": {"x": 1}, "z": 1}
    parsed = Document("recipe", {"parameters": {"hub_private": False}})
    assert publishing.without_keys(parsed).data == {"parameters": {}}
    plain = Document.parse("a: 1\n", "r.yml")
    assert publishing.without_keys(plain) is plain


def test_the_command_pushes_a_folder_and_a_dry_run_sends_nothing(
    hub: HubStandIn, api: HfApi, model_folder: Callable[..., Path]
) -> None:
    made = model_folder()
    looked = run("push", made, "merged", "--dry-run")
    assert looked.exit_code == 0, looked.output
    assert "alice/merged would be made" in looked.output
    assert "model.safetensors" in looked.output
    assert {r.method for r in hub.requests} == {"GET"}
    refused = run("push", made, REPO, "--public")
    assert "--i-checked-the-licences" in refused.output
    assert not hub.seen("create")
    done = run("push", made, REPO, "--public", "--i-checked-the-licences", "--tag", "v1")
    assert done.exit_code == 0, done.output
    assert not hub.repo(REPO).private
    assert f"{hub.url}/{REPO}" in done.output
    assert "is public, and publishing is private unless asked" in " ".join(
        run("push", made, REPO).output.split()
    )


def test_what_allows_no_derivatives_is_said_and_never_proposed_for_the_public(
    hub: HubStandIn, recipe: Callable[..., Path], tiny_models: TinyModels
) -> None:
    card = tiny_models.experts[0] / "README.md"
    card.write_text("---\nlicense: cc-by-nd-4.0\n---\n", encoding="utf-8")
    try:
        public = " ".join(merge(recipe(hub_private=False)).output.split())
        assert "the licences forbid to publish this" in public
        assert "need a look" not in public
        assert "--i-checked-the-licences" not in public
        for method in ("layerwise", "unconstrained"):
            planned = merge(recipe(method, push_to_hub=None, dry_run=True)).output
            assert planned.count("the result is private only (refused): ") == 1
        done = merge(recipe())
        assert done.exit_code == 0, done.output
        assert done.output.count("the result is private only (refused): ") == 1
        assert "allows no derivatives" in done.output.rpartition("private only (refused)")[2]
        assert done.output.count("private only (refused)") == 2  # the push says it too
        assert hub.repo(REPO).private
    finally:
        card.unlink()
