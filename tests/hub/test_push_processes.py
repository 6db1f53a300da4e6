"""Publishing from processes of their own: killed, cut off, and loaded again elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import TinyModels
from tests.fusion.conftest import make_tokenizer as make_tokenizer
from tests.fusion.tiny_fusion import save_model, write_data, write_recipe
from tests.hub.conftest import holds
from tests.hub_stand_in import Fault, HubStandIn

pytestmark = pytest.mark.slow
REPO = "alice/merged"
LOGITS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], revision="v1")
with torch.no_grad():
    torch.save(model(torch.tensor([[5, 6, 7]])).logits, sys.argv[2])
"""


class World:
    """A Hub and a folder to work in; every command is a process."""

    def __init__(self, hub: HubStandIn, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        self.said: list[str] = []

    def environment(self, home: str) -> dict[str, str]:
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "0", "HF_DEBUG": "1"}
        return {**os.environ, **self.hub.environment(self.folder / home), **quiet}

    def start(self, *command: Any, home: str = "home") -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=self.folder,
            env=self.environment(home),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: Any, home: str = "home", code: int = 0) -> str:
        process = self.start(*command, home=home)
        said, _ = process.communicate(timeout=300)
        self.said.append(said)
        assert process.returncode == code, said
        return " ".join(said.split())

    def logits(self, place: str | Path, home: str) -> Any:
        import torch

        kept = self.folder / f"{home}.pt"
        self.run("-c", LOGITS, place, kept, home=home)
        return torch.load(kept)

    def check_no_token(self) -> None:
        """In nothing that was said, and in no file; HF_DEBUG shows every request."""
        assert self.said
        assert not any(self.hub.token in said for said in self.said)
        for path in self.folder.rglob("*"):
            if path.is_file():
                assert self.hub.token.encode() not in path.read_bytes(), path


@pytest.fixture
def world(tmp_path: Path) -> Any:
    with HubStandIn(tmp_path / "hub", multipart_above=2**20, part_size=2**19) as hub:
        made = tmp_path / "work"
        made.mkdir()
        yield World(hub, made)


PUSH = "from mergekit_unconstrained.cli import main; main()"


def test_a_push_that_is_killed_goes_on_where_it_was(world: World, folder: Path) -> None:
    hub = world.hub
    held = hub.hold("lfs-part", skip=2)  # of the large file's four parts
    process = world.start("-c", PUSH, "push", folder, REPO)
    assert held.reached.wait(120)
    stop = hub.hold("commit")  # whatever else was on its way has arrived
    os.kill(process.pid, signal.SIGKILL)
    said, _ = process.communicate()
    world.said.append(said)
    assert process.returncode == -signal.SIGKILL
    hub.faults.clear()
    held.release()
    stop.release()
    assert len(hub.commits(REPO)) == 1
    arrived = dict(hub.repo(REPO).objects)
    assert 0 < len(arrived) < 3  # the small ones are there, the large one is not
    before = len(hub.requests)
    told = world.run("-c", PUSH, "push", folder, REPO, "--tag", "v1")
    assert "going on with an interrupted push" in told
    sent = [r.endpoint for r in hub.requests[before:] if r.endpoint in ("lfs-put", "lfs-complete")]
    assert len(sent) == 3 - len(arrived)
    assert holds(hub, REPO, folder)
    assert len(hub.commits(REPO)) == 2
    world.check_no_token()


def cut_off(hub: HubStandIn) -> None:
    """The commit happens, and from then on the Hub cannot be asked about it."""
    gone = Fault("info", 401, times=9999, path=f"/{REPO}")
    hub.add(Fault("commit", cut="after", path=f"/{REPO}/", then=(gone,)))


def test_the_chain_of_a_layerwise_recipe(world: World, tiny_models: TinyModels) -> None:
    import torch

    for name, model in (("base", tiny_models.base), ("expert", tiny_models.experts[0])):
        shutil.copytree(model, world.folder / name)
    data = {
        "merge_method": "layerwise",
        "base_model": "base",
        "models": [{"model": "expert", "parameters": {"weight": 0.5}}],
        "parameters": {"push_to_hub": REPO, "hub_tag": "v1"},
        "dtype": "bfloat16",
    }
    (world.folder / "recipe.yml").write_text(yaml.safe_dump(data))
    _chain(world)
    assert torch.equal(world.logits("out", "here"), world.logits(REPO, "fresh"))
    world.check_no_token()


def test_the_chain_of_a_fusion_that_pushes_its_checkpoints(
    world: World, make_tokenizer: Callable[..., Any]
) -> None:
    import torch

    folder = world.folder
    pivot = save_model(folder / "pivot", make_tokenizer("metaspace"), "llama")
    source = save_model(folder / "teacher", make_tokenizer("gpt2"), "gpt2", seed=1)
    (source / "README.md").write_text("---\nlicense: llama3\n---\n")
    pushes = {
        "push_to_hub": True,
        "hub_model_id": "alice/steps",
        "hub_strategy": "checkpoint",
    }
    recipe = write_recipe(
        folder, pivot, [source], write_data(folder / "data.jsonl"),
        {"training": pushes, "save_steps": 3},
        push_to_hub=REPO, hub_tag="v1",
    )  # fmt: skip
    recipe.rename(folder / "recipe.yml")
    world.hub.add(Fault("commit", 500, path="/alice/steps"))
    _chain(world)
    assert "a checkpoint was not pushed to alice/steps" in " ".join(world.said[0].split())
    assert torch.equal(world.logits("out", "here"), world.logits(REPO, "fresh"))
    card = world.hub.content(REPO, "README.md").decode()
    assert "llama3" in card
    assert "Llama 3" in card
    report = json.loads(world.hub.content(REPO, "fusion.json"))
    for value in report["held_out_bits_per_byte"].values():
        assert f"{value['bits_per_byte']:.3f}" in card
    steps = world.hub.repo("alice/steps")
    assert steps.private
    titles = [c.title for c in world.hub.commits("alice/steps")]
    assert titles == ["Training in progress, step 3, checkpoint", "initial commit"]
    assert "last-checkpoint/model.safetensors" in world.hub.commits("alice/steps")[0].files
    world.check_no_token()


def _chain(world: World) -> None:
    """Cut after the commit, run again: one commit; verified, reproduced, and a flipped byte."""
    hub = world.hub
    merge = ("-m", "mergekit.scripts.run_yaml", "recipe.yml", "out")
    cut_off(hub)
    first = world.run(*merge, code=1)
    assert "out is complete and stays, but: cannot" in first
    assert len(hub.commits(REPO)) == 2
    hub.faults.clear()
    assert "all of it was there already" in world.run(*merge)
    assert len(hub.commits(REPO)) == 2
    assert hub.repo(REPO).refs["refs/tags/v1"] == hub.commits(REPO)[0].sha
    assert hub.repo(REPO).private
    assert not hub.seen("delete")
    assert "byte for byte" in world.run("-c", PUSH, "reproduce", "out")
    world.run("-c", PUSH, "verify", "out")
    world.run("-c", PUSH, "verify", REPO)
    spoilt = world.folder / "spoilt"
    spoilt.mkdir()
    for file in (world.folder / "out").iterdir():
        (spoilt / file.name).write_bytes(file.read_bytes())
    weights = bytearray((spoilt / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (spoilt / "model.safetensors").write_bytes(weights)
    assert "model.safetensors" in world.run("-c", PUSH, "verify", "spoilt", code=1)
    assert "is not what was written there" in world.run("-c", PUSH, "push", "spoilt", REPO, code=1)
    assert len(hub.commits(REPO)) == 2
