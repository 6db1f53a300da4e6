"""A search publishes what it found, and goes on with a push that failed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from mergekit_unconstrained.cli import main
from mergekit_unconstrained.jobs import publishing
from tests.hub.conftest import Clock
from tests.hub_stand_in import HubStandIn
from tests.search.conftest import planted as planted
from tests.search.conftest import search_file as search_file

pytestmark = pytest.mark.slow
REPO = "alice/found"


def test_a_search_is_published_and_the_same_command_goes_on(
    hub: HubStandIn,
    search_file: Callable[..., Path],
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publishing, "Patience", lambda tell: clock.patience)
    plain = yaml.safe_load(search_file().read_text())["recipe"]

    def search(**hub_options: object) -> Result:
        recipe = copy.deepcopy(plain)
        recipe["parameters"] = {**(recipe.get("parameters") or {}), **hub_options}
        file = search_file(budget=3, baselines=[], recipe=recipe)
        return CliRunner().invoke(main, ["search", str(file), str(tmp_path / "out")])

    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    refused = search(push_to_hub=REPO)
    assert "may only read" in refused.output
    assert not (tmp_path / "out.search" / "journal.log").exists()
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.fail("commit", 403, times=99)
    first = search(push_to_hub=REPO, hub_tag="v1")
    assert first.exit_code == 1
    assert "out is complete and stays, but: cannot upload to" in " ".join(first.output.split())
    hub.faults.clear()
    second = search(push_to_hub=REPO, hub_tag="v1")
    assert second.exit_code == 0, second.output
    assert len(hub.commits(REPO, "v1")) == 2
    files = hub.commits(REPO)[0].files
    assert {"report.json", "merge.yml", "README.md", "model.safetensors"} <= set(files)
    for name in ("merge.yml", "mergekit_config.yml", "README.md"):
        assert b"push_to_hub" not in hub.content(REPO, name)
