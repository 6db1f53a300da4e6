"""The page is built, its command answers, and a Space that can be deployed is written."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import HfApi

from mergekit_unconstrained import __version__
from mergekit_unconstrained.cli import main
from mergekit_unconstrained.errors import OutputError
from mergekit_unconstrained.space import export
from tests.hub.conftest import client_for
from tests.hub_stand_in import HubStandIn

with_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="needs the extra `space`"
)


BUILD = """
import json, sys
import gradio.oauth
from mergekit_unconstrained.space.app import build, settings_of_space
from mergekit_unconstrained.space.desk import Desk

for name in ("OAUTH_CLIENT_ID", "OAUTH_CLIENT_SECRET", "OAUTH_SCOPES", "OPENID_PROVIDER_URL"):
    setattr(gradio.oauth, name, "http://127.0.0.1:9")

def token():
    print("TOKEN ASKED FOR", file=sys.stderr)

page = build(Desk(settings_of_space()), token)
print("CONFIG", json.dumps(page.get_config_file(), default=str))
"""


def built(tmp_path: Path, **environment: str) -> tuple[dict[str, Any], bool]:
    """The page's configuration, and whether the server's own token was asked for."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD],
        env={**os.environ, "MERGEKIT_UNCONSTRAINED_SPACE": str(tmp_path / "work"), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout.rpartition("CONFIG")[2])
    return config, "TOKEN ASKED FOR" in done.stderr


def asks_to_sign_in(config: dict[str, Any]) -> bool:
    """Whether the page has Gradio's login button, which the page's config calls a button."""
    return any("Sign in with" in str(c["props"].get("value")) for c in config["components"])


@pytest.mark.slow
@with_gradio
def test_the_page_is_built_and_nothing_of_it_can_be_called_by_name(tmp_path, models_dir):
    (tmp_path / "work").mkdir()
    shutil.copytree(models_dir, tmp_path / "work" / "models")
    config, _ = built(tmp_path)
    kinds = {c["id"]: c["type"] for c in config["components"]}
    for dependency in config["dependencies"]:
        if dependency["api_visibility"] != "private":  # the sliders' own drawing
            assert [kinds[i] for i in dependency["inputs"]] == ["state"]
    assert not asks_to_sign_in(config)
    named = {c["props"].get("elem_id"): c["props"] for c in config["components"]}
    for name in ("base", "experts"):
        assert "llama/expert1" in [c[0] for c in named[name]["choices"]]
    assert named["private"]["value"] is True
    assert named["card"]["sanitize_html"] is True
    for props in named.values():
        if "choices" in props or "max_length" in props:
            assert props["label"]


@pytest.mark.slow
@with_gradio
def test_a_space_asks_people_to_sign_in_and_never_for_the_servers_token(tmp_path):
    config, asked = built(tmp_path, SPACE_ID="me/space", SYSTEM="spaces", HF_TOKEN="hf_server")
    assert not asked
    assert asks_to_sign_in(config)


def test_a_space_is_written_with_what_the_hub_has_to_know(tmp_path):
    pytest.importorskip("gradio")
    out = tmp_path / "space"
    result = CliRunner().invoke(main, ["space", "export", str(out), "--title", "My: Space"])
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "app.py", "requirements.txt"]
    _, front, _ = (out / "README.md").read_text().split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["title"] == "My: Space"
    assert (data["sdk"], data["python_version"]) == ("gradio", "3.12")
    assert isinstance(data["python_version"], str)
    assert data["sdk_version"] == importlib.metadata.version("gradio")
    assert data["hf_oauth"] is True
    assert data["hf_oauth_scopes"] == ["contribute-repos", "gated-repos", "jobs"]
    assert (
        out / "requirements.txt"
    ).read_text() == f"mergekit-unconstrained[space]=={__version__}\n"
    compile((out / "app.py").read_text(), "app.py", "exec")
    again = CliRunner().invoke(main, ["space", "export", str(out)])
    assert again.exit_code == 1
    assert "not empty" in again.output


def test_a_requirement_is_one_line():
    pytest.importorskip("gradio")
    with pytest.raises(OutputError, match="one line"):
        export.files("t", "a\n--index-url http://x")


def test_a_space_is_deployed_once_and_then_updated(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    with HubStandIn(tmp_path / "hub") as hub:
        client_for(monkeypatch, hub, tmp_path / "home")
        api = HfApi(endpoint=hub.url, token=hub.token)
        url = export.deploy("alice/mixer", api=api)
        assert url == f"{hub.url}/spaces/alice/mixer"
        repo = hub.repo("alice/mixer", "space")
        assert repo.private
        assert hub.content("alice/mixer", "app.py", kind="space").decode() == export.APP
        export.deploy("alice/mixer", requirement="git+https://example.org/x.git", api=api)
        text = hub.content("alice/mixer", "requirements.txt", kind="space").decode()
        assert text == "git+https://example.org/x.git\n"
        with pytest.raises(OutputError):
            export.deploy("a/b/c", api=api)


def test_a_missing_extra_is_a_sentence(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gradio" else find(name, *a)
    )
    result = CliRunner().invoke(main, ["space", "--work-dir", str(tmp_path / "w")])
    assert result.exit_code == 1
    assert 'pip install "mergekit-unconstrained[space]"' in result.output
    assert CliRunner().invoke(main, ["space", "--help"]).exit_code == 0
