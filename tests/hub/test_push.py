"""Publishing a folder with the real client: what arrives, and that it can be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from mergekit_unconstrained.hub.push import push
from tests.hub.conftest import Clock, holds
from tests.hub_stand_in import HubStandIn

REPO = "alice/merged"


def test_a_folder_arrives_whole_in_one_private_commit(
    hub: HubStandIn, api: HfApi, folder: Path, clock: Clock
) -> None:
    done = push(folder, REPO, tag="v1", api=api, patience=clock.patience, quiet=True)
    assert holds(hub, REPO, folder)
    assert done.commit == hub.commits(REPO)[0].sha == hub.commits(REPO, "v1")[0].sha
    assert len(hub.commits(REPO)) == 2
    assert hub.repo(REPO).private
    assert (done.files, done.sent, done.resumed, done.private) == (7, done.bytes, False, True)
    assert done.url == f"{hub.url}/{REPO}"
    assert hub.seen("lfs-part")
    assert hub.seen("lfs-put")
    assert clock.waits == []
    order = [r.endpoint for r in hub.requests]
    first = [order.index(name) for name in ("whoami", "create", "auth-check", "lfs-batch")]
    assert first == sorted(first)


@pytest.mark.parametrize("shards", [False, pytest.param(True, id="sharded, over 10 MB")])
def test_what_was_published_gives_equal_logits(
    hub: HubStandIn, api: HfApi, model_folder: Callable[..., Path], clock: Clock, shards: bool
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = model_folder(shards)
    done = push(made, REPO, tag="v1", api=api, patience=clock.patience, quiet=True)
    assert (done.bytes > 10 * 2**20) == shards
    assert len(list(made.glob("*.safetensors"))) > 2 or not shards
    checked = api.verify_repo_checksums(REPO, revision="v1", local_dir=made)
    assert (checked.mismatches, checked.extra_paths) == ([], [".publication.json"])
    there = huggingface_hub.snapshot_download(REPO, revision="v1")
    assert there != str(made)
    tokens = AutoTokenizer.from_pretrained(made)("equal logits", return_tensors="pt").input_ids
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(place)(tokens).logits for place in (made, there)
        )
    assert torch.equal(ours, theirs)
