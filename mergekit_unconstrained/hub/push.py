"""Publishing a finished folder on the Hub: one commit, checked, and nothing lost on the way.

access -> hashes -> what is there already -> card's metadata -> large files -> one commit with the
parent that was seen -> the Hub's hashes against ours -> tag -> public, if asked

Nothing is ever deleted, and the same call again goes on wherever it was ended: large files that
arrived are not sent again, files that are committed are not committed again. An answer that is lost
on its way back is no failure when the hashes agree.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from mergekit_unconstrained.errors import HubError
from mergekit_unconstrained.hub import publication, refs
from mergekit_unconstrained.hub.access import Access, Hub, check_access, connect
from mergekit_unconstrained.hub.gate import check_gate, licence_lines
from mergekit_unconstrained.hub.local_files import (
    Hashes,
    LocalFile,
    differing,
    hash_all,
    local_files,
    refuse_secrets,
)
from mergekit_unconstrained.hub.refusals import MAKE_PUBLIC
from mergekit_unconstrained.hub.retry import Patience, lost

XET_RESUMES = {
    "HF_XET_DATA_SESSION_XORB_METADATA_FLUSH_INTERVAL": "1s",
    "HF_XET_DATA_SESSION_XORB_METADATA_FLUSH_MAX_COUNT": "1",
}
"""With these hf_xet notes what it has sent, and a killed upload does not begin anew."""

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""A bar of so many bytes; gives what is told how many more were done."""


@dataclass(frozen=True)
class Pushed:
    """What was published. files, bytes: of the whole folder; sent: those that changed.

    resumed: whether an earlier push of this folder had begun. pull_request: its address, None for
    a push to main. tag: None where none was asked for.
    """

    repo_id: str
    url: str
    commit: str
    files: int
    bytes: int
    sent: int
    seconds: float
    resumed: bool
    private: bool
    tag: str | None = None
    pull_request: str | None = None


@dataclass(frozen=True)
class _Upload:
    """One push under way. ref: the branch or pull request; head: its commit when we looked."""

    hub: Hub
    repo_id: str
    ref: str
    head: str
    files: list[LocalFile]
    hashes: dict[str, Hashes]
    title: str


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = True,
    tag: str | None = None,
    pr: bool = False,
    checked_licences: bool = False,
    api: HfApi | None = None,
    patience: Patience | None = None,
    progress: Progress = lambda *_: nullcontext(lambda _: None),
    quiet: bool = False,
) -> Pushed:
    """Publish a folder. HubError names cause and remedy, and the folder stays as it is.

    private: False makes the repository public at the end, which the licences must allow or
    `checked_licences` answer for. pr: as a pull request. progress: draws bars in bytes.
    """
    started = time.monotonic()
    hub = connect(api, patience)
    if pr and tag is not None:
        raise HubError("a pull request cannot be tagged: tag the commit when it is merged")
    files = local_files(folder)
    refuse_secrets(files, _token(hub.api))
    if not private:
        check_gate(folder, checked_licences, repo_id)
    access = check_access(
        repo_id, private=private, tag=tag, pr=pr, api=hub.api, patience=hub.patience
    )
    if private and not access.private:  # a pull request on a public one is public as well
        check_gate(folder, checked_licences, repo_id)
    if not pr:
        publication.address(folder, access.repo_id, tag)
        files = local_files(folder)
    total = sum(file.size for file in files)
    with progress("hashing", total) as advance:
        hashes = hash_all(files, advance)
    publication.check_hashes(folder, {name: h.sha256 for name, h in hashes.items()})
    resumed = publication.begin(folder, access.repo_id)
    pull = refs.own_pull_request(hub, access.repo_id, access.user) if pr else None
    ref, head = (
        (pull.ref, refs.head_of(hub, access.repo_id, pull.ref)) if pull else ("main", access.head)
    )
    upload = _Upload(hub, access.repo_id, ref, head, files, hashes, f"Upload {folder.name}")
    changed = differing(files, hashes, _remote(upload, head))
    if tag is not None:
        refs.check_tag(hub, access.repo_id, tag, None if changed else head)
    commit = _send(upload, changed, quiet) if changed else head
    _verify(upload, commit)
    if tag is not None:
        with _only_missing(f"the tag {tag}", commit):
            refs.set_tag(hub, access.repo_id, tag, commit)
    if not private and access.private and not pr:
        with _only_missing("that it is public", commit):
            hub.ask(
                lambda: hub.api.update_repo_settings(access.repo_id, private=False),
                MAKE_PUBLIC,
                access.repo_id,
            )
    publication.finish(folder, access.repo_id, commit)
    return Pushed(
        repo_id=access.repo_id,
        url=pull.url if pull else f"{hub.api.endpoint}/{access.repo_id}",
        commit=commit,
        files=len(files),
        bytes=total,
        sent=sum(file.size for file in changed),
        seconds=time.monotonic() - started,
        resumed=resumed,
        private=access.private and private,
        tag=tag,
        pull_request=pull.url if pull else None,
    )


@contextmanager
def _only_missing(what: str, commit: str) -> Iterator[None]:
    """An error of what comes behind the commit says that the files are there."""
    try:
        yield
    except HubError as error:
        raise HubError(
            f"all files are published already (commit {commit[:12]}), only {what} is missing: "
            f"{error.message}"
        ) from error


def look(
    folder: Path,
    repo_id: str,
    *,
    private: bool = True,
    tag: str | None = None,
    pr: bool = False,
    checked: bool = False,
    api: HfApi | None = None,
    patience: Patience | None = None,
) -> tuple[Access, list[LocalFile], tuple[str, ...]]:
    """All that `push` checks before it sends anything; the repository is not made.

    Gives the repository, the files, and lines about the licences.
    """
    hub = connect(api, patience)
    files = local_files(folder)
    refuse_secrets(files, _token(hub.api))
    if not private:
        check_gate(folder, checked, repo_id)
    access = check_access(
        repo_id, private=private, tag=tag, pr=pr, create=False, api=hub.api, patience=hub.patience
    )
    if private and not access.private:
        check_gate(folder, checked, repo_id)
    return access, files, licence_lines(folder, repo_id)


# -- sending ---------------------------------------------------------------------------------------


def _send(upload: _Upload, changed: list[LocalFile], quiet: bool) -> str:
    """Everything that is not there yet, in one commit; gives the commit."""
    hub, repo_id = upload.hub, upload.repo_id
    readme = next((f for f in changed if f.name == "README.md"), None)
    if readme is not None:  # before gigabytes are sent; the commit asks again
        hub.ask(lambda: _validate_card(hub.api, readme), "publish to", repo_id)
    operations = [_operation(file, upload.hashes[file.name]) for file in changed]
    for name, value in XET_RESUMES.items():
        os.environ.setdefault(name, value)
    with _bars(quiet):
        hub.ask(lambda: _send_large(upload, operations), "upload to", repo_id)
        return _commit(upload, operations)


def _send_large(upload: _Upload, operations: list[CommitOperationAdd]) -> None:
    """Large files, before the commit that names them. Those that are there are not sent again."""
    upload.hub.api.preupload_lfs_files(
        upload.repo_id,
        additions=operations,
        revision=upload.ref,
        free_memory=False,  # they are needed again when the commit is tried again
    )


def _operation(file: LocalFile, hashes: Hashes) -> CommitOperationAdd:
    operation = CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.path)
    operation.upload_info.sha256 = bytes.fromhex(hashes.sha256)  # not read a second time
    return operation


def _commit(upload: _Upload, operations: list[CommitOperationAdd]) -> str:
    """One commit on top of `head`, however often it has to be asked for.

    With a parent it happens once at most. Where it is not known whether it happened, the branch
    tells: still at `head`, it did not; moved and with our files, it did; moved otherwise, somebody
    else was there.
    """
    hub, repo_id = upload.hub, upload.repo_id

    def attempt() -> str:
        try:
            made = hub.api.create_commit(
                repo_id,
                operations,
                commit_message=upload.title,
                revision=upload.ref,
                parent_commit=upload.head,
            )
            return str(made.oid)
        except Exception as error:
            if not lost(error):
                raise
            now = refs.head_of(hub, repo_id, upload.ref)
            if now == upload.head:
                raise
            if not differing(upload.files, upload.hashes, _remote(upload, now)):
                return now
            raise HubError(
                f"somebody else changed {repo_id} while this was uploading: look at "
                f"{hub.api.endpoint}/{repo_id}/commits/main. Nothing was overwritten; run the same "
                "command again to put these files on top"
            ) from error

    return hub.ask(attempt, "upload to", repo_id, also=(409, 412))


@contextmanager
def _bars(quiet: bool) -> Iterator[None]:
    """huggingface_hub's own bars, in bytes; none when quiet."""
    if not quiet or huggingface_hub.utils.are_progress_bars_disabled():
        yield
        return
    huggingface_hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        huggingface_hub.utils.enable_progress_bars()


def _validate_card(api: HfApi, readme: LocalFile) -> None:
    """Ask the Hub whether it takes the card's metadata; HubError with what it says."""
    answer: Any = huggingface_hub.get_session().post(
        f"{api.endpoint}/api/validate-yaml",
        json={"content": readme.path.read_text(encoding="utf-8"), "repoType": "model"},
        headers=build_hf_headers(token=api.token),
    )
    if answer.status_code == 400:
        told = "; ".join(str(error.get("message")) for error in answer.json().get("errors", []))
        raise HubError(f"the Hub does not take the metadata at the top of {readme.path}: {told}")
    hf_raise_for_status(answer)
    answer.json()  # a proxy's page is no answer


# -- looking ---------------------------------------------------------------------------------------


def _remote(upload: _Upload, commit: str) -> dict[str, RepoFile]:
    """What the Hub has at a commit, by name."""
    hub, repo_id = upload.hub, upload.repo_id

    def listing() -> list[Any]:
        return list(hub.api.list_repo_tree(repo_id, recursive=True, revision=commit))

    found = hub.ask(listing, "read", repo_id)
    return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}


def _verify(upload: _Upload, commit: str) -> None:
    """Every file's hash on the Hub is ours."""
    wrong = differing(upload.files, upload.hashes, _remote(upload, commit))
    if wrong:
        names = ", ".join(file.name for file in wrong[:5])
        raise HubError(
            f"{upload.repo_id} at {commit} does not hold what was sent: {names} differ. It was not "
            "tagged nor made public; run the same command again"
        )


def _token(api: HfApi) -> str | None:
    return api.token if isinstance(api.token, str) else huggingface_hub.get_token()
