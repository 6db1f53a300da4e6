"""What is found out before anything is sent: token, rights, names, parents, licences, secrets."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from huggingface_hub import HfApi, constants

from mergekit_unconstrained.cli import main
from mergekit_unconstrained.errors import HubError
from mergekit_unconstrained.hub import gate, provenance, publication
from mergekit_unconstrained.hub.access import check_access
from mergekit_unconstrained.hub.facts import Method, Parent, Source
from mergekit_unconstrained.hub.licences import verdict
from mergekit_unconstrained.hub.names import check_tag_name
from mergekit_unconstrained.hub.push import look, push
from mergekit_unconstrained.hub.refusals import redacted
from tests.hub.conftest import Clock, holds
from tests.hub_stand_in import HubStandIn

REPO = "alice/merged"


def test_a_free_name_is_made_private_and_a_known_one_is_taken(hub: HubStandIn, api: HfApi) -> None:
    first = check_access("merged", api=api)
    assert (first.repo_id, first.user, first.created) == (REPO, "alice", True)
    assert hub.repo(REPO).private
    assert first.head == hub.commits(REPO)[0].sha
    second = check_access(REPO, api=api)
    assert (second.created, second.head) == (False, first.head)
    assert check_access("acme/merged", api=api).private


def test_a_fine_grained_token_writes_where_it_may(hub: HubStandIn, clock: Clock) -> None:
    api = HfApi(endpoint=hub.url, token=hub.member_token)
    assert check_access("acme/merged", api=api).created
    with pytest.raises(HubError, match="the token has no right to"):
        check_access(REPO, api=api, patience=clock.patience)


def test_a_read_only_token_is_refused_even_where_the_repository_is(
    hub: HubStandIn, api: HfApi
) -> None:
    check_access(REPO, api=api)
    with pytest.raises(HubError, match="'test' of alice may only read"):
        check_access(REPO, api=HfApi(endpoint=hub.url, token=hub.read_token))


def test_a_wrong_token_and_none(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "hf_" + "x" * 34
    with pytest.raises(HubError, match="does not accept the token") as raised:
        check_access(REPO, api=HfApi(endpoint=hub.url, token=wrong))
    assert wrong not in raised.value.message
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="there is no token"):
        check_access(REPO, api=HfApi(endpoint=hub.url))


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("bob/merged", "bob is neither it nor one of its organisations. Publish under one of ali"),
        ("a/b/c", "that is no name of a repository"),
        ("alice/has space", "that is no name of a repository"),
        ("alice/" + "x" * 99, "that is no name of a repository"),
        ("alice/../etc", "that is no name of a repository"),
    ],
)
def test_names_that_cannot_be(hub: HubStandIn, api: HfApi, repo_id: str, message: str) -> None:
    with pytest.raises(HubError, match=message):
        check_access(repo_id, api=api)
    assert not hub.seen("create")


def test_a_name_that_is_somebody_elses(hub: HubStandIn, api: HfApi, clock: Clock) -> None:
    hub.put("bob/merged", {"config.json": b"{}"})
    with pytest.raises(HubError, match="another name, or --pr"):
        check_access("bob/merged", private=False, api=api, patience=clock.patience)


def test_a_public_repository_is_not_written_by_mistake(
    hub: HubStandIn, api: HfApi, folder: Path
) -> None:
    hub.put(REPO, {"config.json": b"{}"})
    with pytest.raises(HubError, match="is public, and publishing is private unless asked"):
        push(folder, REPO, api=api)
    with pytest.raises(HubError, match="nothing is known of the licences"):
        push(folder, REPO, private=False, api=api)
    assert len(hub.commits(REPO)) == 2  # as it was


def test_a_gated_parent_is_named_with_the_way_to_it(hub: HubStandIn, api: HfApi) -> None:
    hub.put("meta/llama", {"config.json": b"{}"}).gated = True
    with pytest.raises(HubError, match=f"it is gated: ask for access at {hub.url}/meta/llama"):
        check_access(REPO, parents=["meta/llama"], api=api)
    hub.repo("meta/llama").readers.add("alice")
    assert check_access(REPO, parents=["meta/llama"], api=api).created


def test_no_way_to_the_hub(hub: HubStandIn, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(endpoint: str) -> str:
        api = HfApi(endpoint=endpoint, token=hub.token)
        with pytest.raises(HubError) as raised:
            check_access(REPO, api=api, patience=clock.patience)
        return raised.value.message

    assert "cannot be reached" in message("http://127.0.0.1:9")
    assert len(clock.waits) == 2
    assert "which is no address: it begins with https://" in message("huggingface.co")
    assert "does not answer as the Hub does" in message(hub.storage_url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in message(hub.url)


def test_an_impossible_tag_is_refused_before_anybody_is_asked(
    hub: HubStandIn, api: HfApi, folder: Path
) -> None:
    for tag in ("../v1", "v1.lock", "a b", "v..1", "", "-v1", "a/b"):
        with pytest.raises(HubError, match="is no name for a tag"):
            check_access(REPO, tag=tag, api=api)
    check_tag_name("feature/x", branch=True)
    with pytest.raises(HubError, match="is no name for a tag"):
        check_tag_name("feature//x", branch=True)
    for command in (["push", str(folder), REPO], ["card", str(folder)]):
        told = CliRunner().invoke(main, [*command, "--tag", "no tag"])
        assert (told.exit_code, told.output.count("\n")) == (1, 1), told.output
        assert "'no tag' is no name for a tag" in told.output
    assert not hub.requests


def test_a_refusal_behind_the_commit_says_that_the_files_are_there(
    hub: HubStandIn, api: HfApi, clock: Clock, folder: Path
) -> None:
    for endpoint, missing in (("tag", "the tag v1"), ("settings", "that it is public")):
        hub.fail(endpoint, 403, times=9)
        with pytest.raises(HubError) as raised:
            push(
                folder, REPO, tag="v1", private=False, checked_licences=True,
                api=api, patience=clock.patience, quiet=True,
            )  # fmt: skip
        commit = hub.commits(REPO)[0].sha[:12]
        said = f"all files are published already (commit {commit}), only {missing} is missing: "
        assert raised.value.message.startswith(said)
        assert "use one with write access to alice" in raised.value.message
        assert "another name" not in raised.value.message
        hub.faults.clear()
    assert len(hub.commits(REPO)) == 2


def test_offline_or_without_a_token_a_push_ends_before_heavy_imports(
    hub: HubStandIn, folder: Path, tmp_path: Path
) -> None:
    program = (
        "import sys\nfrom mergekit_unconstrained.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'transformers', 'mergekit'} & {*sys.modules}))"
    )
    usual = os.environ | hub.environment(tmp_path / "home")
    usual.pop("HF_HUB_OFFLINE", None)
    without = {name: value for name, value in usual.items() if name != "HF_TOKEN"}
    for environment, message in (
        (usual | {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (without, "there is no token. Run `hf auth login`"),
    ):
        told = subprocess.run(
            [sys.executable, "-c", program, "push", folder, REPO],
            env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert told.returncode == 1
        assert message in told.stderr
        assert told.stdout == "[]\n"
    assert not hub.requests


def test_quota_is_told_from_rights(hub: HubStandIn, api: HfApi, clock: Clock, folder: Path) -> None:
    told = json.dumps({"error": "Private repository storage limit reached"}).encode()
    hub.fail("lfs-batch", 403, body=told, headers={"Content-Type": "application/json"}, times=9)
    with pytest.raises(HubError, match=r"there is no room left .Private repository storage limit"):
        push(folder, REPO, api=api, patience=clock.patience, quiet=True)


def test_a_long_wait_is_left_to_the_user(hub: HubStandIn, api: HfApi, clock: Clock) -> None:
    hub.fail("create", 429, headers={"RateLimit": '"api";r=0;t=3600'}, times=9)
    with pytest.raises(HubError, match="in 60 minutes"):
        check_access(REPO, api=api, patience=clock.patience)
    assert clock.waits == []


# -- what is in the folder -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("README.md", "has no README.md: `mergekit-unconstrained card"),
        ("config.json", "is no finished model: it has no config.json"),
        ("model-0000*", "is no finished model: it has no weights"),
    ],
)
def test_an_unfinished_folder_is_refused(
    hub: HubStandIn, api: HfApi, folder: Path, gone: str, message: str
) -> None:
    for file in folder.glob(gone):
        file.unlink()
    with pytest.raises(HubError, match=message):
        push(folder, REPO, api=api)
    assert hub.requests == []


def test_metadata_that_the_hub_does_not_take_is_told_before_anything_is_sent(
    hub: HubStandIn, api: HfApi, folder: Path
) -> None:
    (folder / "README.md").write_text("---\nlicense: my own\n---\n")
    with pytest.raises(HubError, match=r'does not take the metadata at the top of .*"license"'):
        push(folder, REPO, api=api, quiet=True)
    assert not hub.seen("lfs-batch")


def test_a_file_that_holds_the_token_is_not_published(
    hub: HubStandIn, api: HfApi, folder: Path
) -> None:
    (folder / "train.log").write_text(f"token={hub.token}")
    with pytest.raises(HubError, match="holds your Hub token") as raised:
        push(folder, REPO, api=api)
    assert hub.token not in raised.value.message
    assert not hub.seen("commit")


def test_the_token_is_in_no_message_log_or_file(
    hub: HubStandIn,
    api: HfApi,
    folder: Path,
    clock: Clock,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    body = json.dumps({"error": f"Bearer {hub.token} is bad"}).encode()
    hub.fail("commit", 401, body=body, headers={"Content-Type": "application/json"})
    with pytest.raises(HubError, match="is bad") as raised:
        push(folder, REPO, api=api, patience=clock.patience)
    push(folder, REPO, tag="v1", api=api, patience=clock.patience)
    out, err = capfd.readouterr()
    files = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 10
    said = "\n".join([raised.value.message, caplog.text, *clock.told, out, err])
    assert hub.token not in said
    assert not any(hub.token.encode() in content for content in files)


# -- licences --------------------------------------------------------------------------------------


def test_the_gate_lets_clear_pass_and_refused_never() -> None:
    gate.refuse(verdict([("a", "mit"), ("b", "apache-2.0")]), checked=False)
    unknown = verdict([("a", None)])
    with pytest.raises(HubError, match=r"need a look .*\(review\): The licence of a is not known"):
        gate.refuse(unknown, checked=False)
    gate.refuse(unknown, checked=True)
    for checked in (False, True):
        with pytest.raises(HubError, match="the licences forbid to publish this"):
            gate.refuse(verdict([("a", "cc-by-nd-4.0")]), checked=checked)


def test_a_public_name_that_breaks_a_duty_stops(
    hub: HubStandIn, api: HfApi, folder: Path, clock: Clock
) -> None:
    parents = (Parent("base", Source("o/b", "o/b", licence="llama3.1")),)
    known = provenance.Provenance(
        title="t", method=Method("layerwise", "Layer-wise merging"), parents=parents,
        recipe="mergekit_config.yml", versions={}, machine={}, seconds=1,
    )  # fmt: skip
    provenance.write(folder, known)
    with pytest.raises(HubError, match="name 'merged' does not begin with"):
        push(folder, REPO, private=False, api=api, patience=clock.patience, quiet=True)
    with pytest.raises(HubError, match="does not begin with"):
        look(folder, REPO, private=False, api=api, patience=clock.patience)
    assert not hub.seen("create")
    *_, lines = look(folder, "alice/Llama-m", private=False, api=api, patience=clock.patience)
    assert "status: clear" in lines[0]
    done = push(
        folder, "alice/Llama-m", private=False, api=api, patience=clock.patience, quiet=True
    )
    assert not done.private
    gate.check_gate(folder, True, REPO)


# -- others at the same place ----------------------------------------------------------------------


def test_somebody_elses_commit_is_not_overwritten(
    hub: HubStandIn, api: HfApi, folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = HfApi.create_commit

    def overtaken(self: HfApi, *args: Any, **kwargs: Any) -> Any:
        if len(hub.commits(REPO)) == 1:
            hub.put(REPO, {"README.md": b"by bob"})
        return commit(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", overtaken)
    with pytest.raises(HubError, match=r"somebody else changed alice/merged .* run the"):
        push(folder, REPO, api=api, patience=clock.patience, quiet=True)
    assert hub.content(REPO, "README.md") == b"by bob"
    push(folder, REPO, api=api, patience=clock.patience, quiet=True)
    assert holds(hub, REPO, folder)
    assert [c.title for c in hub.commits(REPO)] == ["Upload merged", "files", "initial commit"]


def test_a_tag_is_never_moved(hub: HubStandIn, api: HfApi, folder: Path, clock: Clock) -> None:
    push(folder, REPO, tag="v1", api=api, patience=clock.patience, quiet=True)
    again = push(folder, REPO, tag="v1", api=api, patience=clock.patience, quiet=True)
    assert again.sent == 0
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(HubError, match="has a tag v1 already, on another commit"):
        push(folder, REPO, tag="v1", api=api, patience=clock.patience, quiet=True)
    assert len(hub.commits(REPO)) == 2
    push(folder, REPO, tag="v2", api=api, patience=clock.patience, quiet=True)
    assert hub.repo(REPO).refs["refs/tags/v1"] != hub.repo(REPO).refs["refs/tags/v2"]


def test_a_pull_request_is_opened_once(
    hub: HubStandIn, api: HfApi, folder: Path, clock: Clock
) -> None:
    hub.put("bob/merged", {"README.md": b"by bob"})
    hub.cut("open-pull", "after")
    hub.cut("commit", "after")
    pushing: dict[str, Any] = {"pr": True, "checked_licences": True, "quiet": True}
    done = push(folder, "bob/merged", api=api, patience=clock.patience, **pushing)
    assert done.pull_request == f"{hub.url}/bob/merged/discussions/1"
    assert len(hub.repo("bob/merged").pulls) == 1
    assert hub.content("bob/merged", "README.md") == b"by bob"
    assert hub.content("bob/merged", "config.json", "refs/pr/1")
    assert len(hub.commits("bob/merged", "refs/pr/1")) == 3
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    push(folder, "bob/merged", api=api, patience=clock.patience, **pushing)
    assert len(hub.repo("bob/merged").pulls) == 1


def test_what_is_on_the_hub_is_compared_with_what_was_sent(
    hub: HubStandIn, api: HfApi, folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = HfApi.create_commit

    def spoilt(self: HfApi, *args: Any, **kwargs: Any) -> Any:
        made = commit(self, *args, **kwargs)
        files = hub.commits(REPO)[0].files
        files["config.json"] = files[".gitattributes"]  # type: ignore[index]
        return made

    monkeypatch.setattr(HfApi, "create_commit", spoilt)
    with pytest.raises(HubError, match=r"does not hold what was sent: config\.json differ"):
        push(folder, REPO, tag="v1", api=api, patience=clock.patience, quiet=True)
    assert "refs/tags/v1" not in hub.repo(REPO).refs


def test_the_reason_that_the_xet_client_drops_is_asked_for(
    hub: HubStandIn, api: HfApi, folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("Unable to retrieve token")

    monkeypatch.setattr(HfApi, "preupload_lfs_files", refuse)
    told = json.dumps({"error": "Storage quota exceeded"}).encode()
    hub.fail("xet-token", 403, body=told, headers={"Content-Type": "application/json"})
    with pytest.raises(HubError, match=r"there is no room left .Storage quota exceeded"):
        push(folder, REPO, api=api, patience=clock.patience, quiet=True)


def test_a_note_that_is_no_note_is_none(tmp_path: Path) -> None:
    assert publication.read(tmp_path) == {}
    (tmp_path / publication.NOTE).write_text("[]")
    assert publication.read(tmp_path) == {}
    assert not publication.begin(tmp_path, REPO)
    assert publication.begin(tmp_path, REPO)
    publication.finish(tmp_path, REPO, "0" * 40)
    assert not publication.begin(tmp_path, REPO)


def test_every_name_of_the_stand_in_is_an_endpoint(hub: HubStandIn) -> None:
    make: Callable[..., Any] = hub.fail
    with pytest.raises(AssertionError, match="no endpoint"):
        make("nowhere", 500)


def test_whatever_looks_like_a_token_is_left_out() -> None:
    other = "hf_" + "abcDEF123" * 3
    said = redacted(f"Authorization: Bearer eyJhbGciOi.x.y and {other} of hf_hub")
    assert said == "Authorization: hf_*** and hf_*** of hf_hub"
