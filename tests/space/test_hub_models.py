"""Models of the Hub: found, and looked at without a weight. The real client, a Hub stand-in."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from mergekit_unconstrained.config.parents import read_header
from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.space import hub_models, inspect
from mergekit_unconstrained.space.hub_models import shadow, write_hollow
from tests.hub.conftest import client_for
from tests.hub_stand_in import HubStandIn


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[HubStandIn]:
    with HubStandIn(tmp_path / "hub") as served:
        client_for(monkeypatch, served, tmp_path / "home")
        yield served


@pytest.fixture
def nobody(hub) -> HfApi:
    """The Hub as it is seen without a token."""
    return HfApi(endpoint=hub.url, token=False)


def answered(hub: HubStandIn) -> int:
    """How many requests there were; one is noted a moment after its answer has arrived."""
    count = -1
    while count != len(hub.requests):
        count = len(hub.requests)
        time.sleep(0.3)
    return count


def test_a_shadow_says_what_the_model_says_and_holds_no_weight(hub, nobody, models_dir, tmp_path):
    hub.put_folder("acme/one", models_dir / "llama/expert2")
    folder = shadow("acme/one", tmp_path / "shadows", nobody)
    real = models_dir / "llama/expert2"
    size = (real / "model.safetensors").stat().st_size
    hollow = folder / "model.safetensors"
    assert hollow.stat().st_size <= size  # the header may be padded in the original
    assert read_header(hollow, "a") == read_header(real / "model.safetensors", "b")
    assert hollow.stat().st_blocks * 512 < 64 * 1024 < size
    found = inspect.look("acme/one", folder)
    assert (found.architecture, found.licence, found.layers) == ("LlamaForCausalLM", "mit", 4)
    fetched = [r.path for r in hub.requests if "model.safetensors" in r.path and r.method == "GET"]
    assert fetched  # the header, by a range
    assert (folder / "tokenizer.json").read_bytes() == (real / "tokenizer.json").read_bytes()


def test_it_is_fetched_once_for_a_commit(hub, nobody, models_dir, tmp_path):
    hub.put_folder("acme/one", models_dir / "llama/base")
    first = shadow("acme/one", tmp_path, nobody)
    before = answered(hub)
    assert shadow("acme/one", tmp_path, nobody) == first
    assert answered(hub) == before + 1  # which commit is it?


def test_models_of_the_hub_and_folders_make_one_verdict(hub, nobody, models_dir, tmp_path):
    hub.put_folder("acme/base", models_dir / "llama/base")
    base = inspect.look("acme/base", shadow("acme/base", tmp_path, nobody))
    expert = inspect.look("llama/expert1", models_dir / "llama/expert1")
    found = inspect.verdict(base, [expert])
    assert found.way == "layerwise"
    from mergekit_unconstrained.space.state import start

    plan = inspect.plan(start("acme/base", "layerwise", found.groups), found)
    assert plan.out_bytes == 180_800 * 2


def test_pickles_missing_models_and_private_ones_are_refused(hub, nobody, models_dir, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(models_dir / "llama/base", old)
    (old / "model.safetensors").rename(old / "pytorch_model.bin")
    hub.put_folder("acme/old", old)
    with pytest.raises(ModelError, match=r"no safetensors.*run code"):
        shadow("acme/old", tmp_path / "s", nobody)
    with pytest.raises(ModelError, match="acme/nowhere cannot be looked at"):
        shadow("acme/nowhere", tmp_path / "s", nobody)
    hub.put_folder("alice/secret", models_dir / "llama/base")
    hub.repo("alice/secret").private = True
    with pytest.raises(ModelError, match="cannot be looked at"):
        shadow("alice/secret", tmp_path / "s", nobody)
    assert shadow("alice/secret", tmp_path / "s", HfApi(endpoint=hub.url, token=hub.token)).is_dir()
    assert not list((tmp_path / "s").rglob(".making-*"))


def test_names_are_found_on_the_hub(hub, nobody, models_dir):
    for name in ("acme/llama-math", "acme/llama-code", "acme/other"):
        hub.put_folder(name, models_dir / "llama/base")
    assert sorted(hub_models.search("llama", nobody)) == ["acme/llama-code", "acme/llama-math"]
    assert hub_models.search("  ", nobody) == []
    hub.fail("search", 503, times=99)
    with pytest.raises(ModelError, match="cannot be searched"):
        hub_models.search("llama", nobody)


def test_a_header_that_promises_too_much_is_not_believed(tmp_path):
    huge = {"w": {"dtype": "F32", "shape": [2**58], "data_offsets": [0, 2**60]}}
    with pytest.raises(ModelError, match="not believed"):
        write_hollow(tmp_path / "x.safetensors", huge)


def test_big_models_cost_no_disk(tmp_path: Path):
    end = 140 * 2**30
    tensor = {"dtype": "BF16", "shape": [end // 2], "data_offsets": [0, end]}
    write_hollow(tmp_path / "x.safetensors", {"w": tensor})
    assert (tmp_path / "x.safetensors").stat().st_size > end
    assert (tmp_path / "x.safetensors").stat().st_blocks * 512 < 64 * 1024
