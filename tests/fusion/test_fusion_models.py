"""Models of a fusion that lie on the Hub, behind a stand-in for its two calls."""

from __future__ import annotations

import shutil
from copy import deepcopy
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from mergekit_unconstrained.compat import ModelReference
from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.fusion.models import LocalModel
from mergekit_unconstrained.fusion.records import Conversation, Turn
from mergekit_unconstrained.jobs.fusion_models import fetch
from tests.fusion.tiny_fusion import MakeTokenizer, save_model

COMMIT = "5" * 40
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_tokenizer: MakeTokenizer
) -> list[str | None]:
    """org/chat on a Hub that keeps to the patterns; gives the revisions that were asked for."""
    tokenizer = deepcopy(make_tokenizer("byte_level"))
    tokenizer.chat_template = TEMPLATE
    remote = save_model(tmp_path / "remote", tokenizer, "llama")
    assert (remote / "chat_template.jinja").is_file()
    asked: list[str | None] = []

    def download(
        name: str, *, revision: str | None, cache_dir: str, allow_patterns: list[str], **_: Any
    ) -> str:
        assert name == "org/chat"
        asked.append(revision)
        folder = Path(cache_dir) / "models--org--chat" / "snapshots" / COMMIT
        for file in remote.rglob("*"):
            inside = file.relative_to(remote)
            if file.is_file() and any(fnmatch(str(inside), p) for p in allow_patterns):
                (folder / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, folder / inside)
        return str(folder)

    def listed(name: str, **_: Any) -> list[str]:
        return [str(f.relative_to(remote)) for f in remote.rglob("*") if f.is_file()]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", listed)
    return asked


def test_a_chat_template_in_a_file_of_its_own_is_fetched_too(
    hub: list[str | None], tmp_path: Path
) -> None:
    reference = ModelReference.parse("org/chat")
    alone = Path(reference.local_path(str(tmp_path / "mergekit")))
    assert not (alone / "chat_template.jinja").exists()  # why there is a second download
    folder = fetch(reference, str(tmp_path / "ours"))
    model = LocalModel("chat", folder, folder, "", 128)
    asked = Conversation(0, (Turn("user", "Hi?"), Turn("assistant", "Ho.")))
    read = model.tokenizer.decode(model.encoder.encode(asked).ids)
    assert read == "[user] Hi?<|im_end|>[assistant] Ho.<|im_end|>"
    assert (folder / "model.safetensors").is_file()
    assert hub[-1] == COMMIT  # of the very commit whose weights are here


def test_a_folder_is_taken_as_it_is(hub: list[str | None], tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    assert fetch(ModelReference.parse(str(tmp_path / "here")), None) == tmp_path / "here"
    assert hub == []


def test_a_connection_that_is_cut_is_one_sentence(
    hub: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: Any, **__: Any) -> str:
        raise ConnectionError("reset\nby peer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cut)
    with pytest.raises(ModelError, match=r"org/chat cannot be fetched .*reset by peer.*is kept"):
        fetch(ModelReference.parse("org/chat"), str(tmp_path / "cache"))
