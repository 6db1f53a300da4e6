"""The stand-in for the Hub, the real client turned towards it, and a folder to publish."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from mergekit_unconstrained.hub.retry import Patience
from tests.conftest import TinyModels
from tests.hub_stand_in import HubStandIn

CARD = "---\nlicense: mit\ntags: [merge]\nbase_model: [org/base]\n---\n# A merge\n"


@dataclass
class Clock:
    """Takes the place of sleeping: notes every wait."""

    waits: list[float] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    @property
    def patience(self) -> Patience:
        return Patience((1.0, 2.0), self.waits.append, self.told.append)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A fresh stand-in; the client in this process talks to it and never really waits."""
    with HubStandIn(tmp_path / "hub", multipart_above=2**20, part_size=2**19) as stand_in:
        client_for(monkeypatch, stand_in, tmp_path / "home")
        yield stand_in


def client_for(monkeypatch: pytest.MonkeyPatch, stand_in: HubStandIn, home: Path) -> None:
    """Turn the client of this process towards a stand-in, with an empty cache."""
    from huggingface_hub.utils import _http, close_session

    close_session()  # connections of another test's stand-in
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
    template = stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("HF_TOKEN", stand_in.token)
    quick = types.SimpleNamespace(sleep=lambda _: None)
    monkeypatch.setattr(_http, "time", quick)
    monkeypatch.setattr(_http.logger, "disabled", True)  # it warns of every fault


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def api(hub: HubStandIn) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two large files (one sent in parts), small ones, and what is not published."""
    made = tmp_path / "merged"
    made.mkdir()
    files: dict[str, bytes] = {
        "README.md": CARD.encode(),
        "config.json": b'{"model_type": "llama"}',
        "model-00001-of-00002.safetensors": os.urandom(2**20 + 2**19 + 7),
        "model-00002-of-00002.safetensors": os.urandom(5000),
        "mergekit_config.yml": b"merge_method: layerwise\n",
        "coefficients.png": b"\x89PNG\0\0" + os.urandom(200),
        ".eval_results/gsm8k.yaml": b"- value: 1\n",
        ".env": b"SECRET=1\n",
        "half.partial": b"x",
    }
    for name, content in files.items():
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_bytes(content)
    return made


PUBLISHED = {
    *("README.md", "config.json", "model-00001-of-00002.safetensors"),
    *("model-00002-of-00002.safetensors", "mergekit_config.yml", "coefficients.png"),
    ".eval_results/gsm8k.yaml",
}


def holds(hub: HubStandIn, repo_id: str, folder: Path, revision: str = "main") -> bool:
    """Whether the Hub has all that is to be published, byte by byte, and its own file."""
    files = hub.repo(repo_id).resolve(revision).files
    return set(files) == {*PUBLISHED, ".gitattributes"} and all(
        hub.content(repo_id, name, revision) == (folder / name).read_bytes() for name in PUBLISHED
    )


@pytest.fixture
def model_folder(make_tiny: Callable[..., TinyModels], tmp_path: Path) -> Callable[..., Path]:
    """A tiny model with a card; `shards`: larger, in files of a few MB each."""

    def make(shards: bool = False) -> Path:
        import shutil

        import transformers

        made = tmp_path / "model"
        if not shards:
            shutil.copytree(make_tiny(experts=0).base, made)
        else:
            sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 2048}
            base = make_tiny(experts=0, **sizes).base
            model = transformers.AutoModelForCausalLM.from_pretrained(base)
            model.save_pretrained(made, max_shard_size="4MB")
            transformers.AutoTokenizer.from_pretrained(base).save_pretrained(made)
        (made / "README.md").write_text(CARD, encoding="utf-8")
        return made

    return make
