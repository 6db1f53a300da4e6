"""Parents on the Hub, and a repository checked: the real client against the stand-in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mergekit_unconstrained.cli import main
from mergekit_unconstrained.hub.provenance import load
from tests.conftest import TinyModels

pytest.importorskip("tests.hub_stand_in")

LICENCES = {"base": "apache-2.0", "math": "gemma", "code": "mit"}


def publish(api: Any, folder: Path, repo_id: str) -> str:
    api.create_repo(repo_id)
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder).oid)


def fresh(hub: Any, home: Path, *arguments: str) -> str:
    """Our command in a process of its own, which never saw the models."""
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(home)}
    own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_XET_TELEMETRY_ENABLED": "0"}
    code = "from mergekit_unconstrained.cli import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_parents_on_the_hub_are_recorded_at_their_commits_with_licence_and_hash(
    hub: Any, api: Any, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models = (tiny_models.base, *tiny_models.experts[:2])
    commits = {}
    for (name, licence), model in zip(LICENCES.items(), models, strict=True):
        shutil.copytree(model, tmp_path / name)
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        commits[f"alice/{name}"] = publish(api, tmp_path / name, f"alice/{name}")
        shutil.rmtree(tmp_path / name)
    recipe = {
        "merge_method": "layerwise",
        "base_model": "alice/base",
        "models": [
            {"model": f"alice/{name}", "parameters": {"weight": 0.5}} for name in ("math", "code")
        ],
        "dtype": "bfloat16",
    }
    Path("recipe.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    fresh(hub, tmp_path / "home", "yaml", "recipe.yml", "out")

    known = load(Path("out"))
    assert {p.model.hub_id: p.model.commit for p in known.parents} == commits
    assert [p.model.licence for p in known.parents] == list(LICENCES.values())
    assert all(p.model.files and p.model.tokenizer for p in known.parents)
    pinned = yaml.safe_load(Path("out/mergekit_config.yml").read_text())
    assert pinned["base_model"] == f"alice/base@{commits['alice/base']}"
    front = yaml.safe_load(Path("out/README.md").read_text().split("---\n")[1])
    assert (front["license"], front["base_model"]) == ("gemma", list(commits))
    assert "equal byte for byte" in fresh(hub, tmp_path / "other", "reproduce", "out")


def test_a_pushed_folder_is_checked_by_the_hubs_hashes(
    hub: Any, api: Any, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = {
        "merge_method": "layerwise",
        "base_model": str(tiny_models.base),
        "models": [{"model": str(tiny_models.experts[0]), "parameters": {"weight": 0.5}}],
        "dtype": "bfloat16",
    }
    Path("recipe.yml").write_text(yaml.safe_dump(recipe))
    assert CliRunner().invoke(main, ["yaml", "recipe.yml", "out", "--quiet"]).exit_code == 0
    first = publish(api, Path("out"), "alice/merged")
    verify = ["verify", "alice/merged"]
    assert CliRunner().invoke(main, verify).exit_code == 0

    weights = Path("out/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    Path("out/config.json").write_text("{}")
    api.upload_folder(repo_id="alice/merged", folder_path="out")
    result = CliRunner().invoke(main, verify)
    assert result.exit_code == 1
    assert "model.safetensors: has other contents" in result.output
    assert "config.json: has 2 bytes" in result.output
    assert CliRunner().invoke(main, [*verify, "--revision", first]).exit_code == 0
    assert CliRunner().invoke(main, ["verify", "alice/other"]).exit_code == 1
