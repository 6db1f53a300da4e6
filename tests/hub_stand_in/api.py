"""The Hub's API, one function an endpoint."""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import yaml

from tests.hub_stand_in import metadata
from tests.hub_stand_in.answer import Answer, Query, ranged
from tests.hub_stand_in.store import (
    LIMIT,
    NAME,
    Blob,
    Commit,
    Refused,
    Repo,
    below,
    described,
    entries,
    is_large,
)

if TYPE_CHECKING:
    from tests.hub_stand_in.server import HubStandIn

DATE = datetime(2026, 1, 1, tzinfo=UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def unknown(hub: HubStandIn, query: Query) -> Answer:
    """Whatever has no route."""
    raise Refused(404, f"Sorry, we can't find {query.groups['path']}")


def unsupported(hub: HubStandIn, query: Query) -> Answer:
    """What the real Hub does and this one never will."""
    raise Refused(501, "the stand-in neither deletes nor moves a repository")


# -- people ----------------------------------------------------------------------------------------


def whoami(hub: HubStandIn, query: Query) -> Answer:
    """Who a token belongs to, and what it may do."""
    token = query.token
    if token is None:
        raise Refused(401, "Invalid username or password.")
    access: dict[str, Any] = {"displayName": "test", "role": token.role, "createdAt": DATE}
    if token.role == "fineGrained":
        scoped = [
            {"entity": {"type": "org", "name": name}, "permissions": ["repo.write"]}
            for name in token.namespaces
        ]
        access["fineGrained"] = {"canReadGatedRepos": True, "global": [], "scoped": scoped}
    orgs = [
        {"type": "org", "name": name, "fullname": name.title(), "roleInOrg": "write"}
        for name in hub.store.members.get(token.user, ())
    ]
    return Answer.json(
        {
            "type": "user",
            "name": token.user,
            "fullname": token.user.title(),
            "email": f"{token.user}@example.com",
            "isPro": False,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": access},
        }
    )


def auth_check(hub: HubStandIn, query: Query) -> Answer:
    """Whether a repository may be read, or written."""
    if query.groups.get("write"):
        hub.store.writable(query.kind, query.repo, query.token)
    else:
        hub.store.readable(query.kind, query.repo, query.token)
    return Answer.json({})


def xet_token(hub: HubStandIn, query: Query) -> Answer:
    """Never one: the stand-in has no Xet storage. Who may not write is told so."""
    hub.store.writable(query.kind, query.repo, query.token)
    raise Refused(501, "the stand-in has no Xet storage")


# -- repositories ----------------------------------------------------------------------------------


def create(hub: HubStandIn, query: Query) -> Answer:
    """A new repository; 409 where there is one of the name."""
    asked = query.json()
    if query.token is None:
        raise Refused(401, "Invalid username or password.")
    namespace = asked.get("organization") or query.token.user
    kind, name = asked.get("type") or "model", str(asked.get("name"))
    repo_id = f"{namespace}/{name}"
    if not hub.store.may_write(query.token, namespace):
        text = f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"'
        raise Refused(403, text)
    if not NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
        raise Refused(400, f"Invalid repository name {name!r}")
    kinds = "" if kind == "model" else f"{kind}s/"
    url = f"{hub.url}/{kinds}{repo_id}"
    if (kind, repo_id) in hub.store.repos:
        raise Refused(409, f"You already created this {kind} repo", url=url, name=repo_id)
    if kind == "space" and not asked.get("sdk"):
        raise Refused(400, '"sdk" is required')
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    hub.store.create(kind, repo_id, private, query.token.user, asked.get("sdk"))
    return Answer.json({"url": url, "name": repo_id, "id": secrets.token_hex(12)})


def settings(hub: HubStandIn, query: Query) -> Answer:
    """Change visibility and gating."""
    repo = hub.store.writable(query.kind, query.repo, query.token)
    asked = query.json()
    if "visibility" in asked or "private" in asked:
        repo.private = asked.get("visibility") == "private" or bool(asked.get("private"))
    if "gated" in asked:
        repo.gated = bool(asked["gated"])
    return Answer.json({"private": repo.private, "gated": repo.gated})


def search(hub: HubStandIn, query: Query) -> Answer:
    """Repositories by a part of their name, those that the token may see."""
    words = query.parameter("search").lower()
    author = query.parameter("author")
    limit = int(query.parameter("limit", "100"))
    found = []
    for (kind, name), repo in sorted(hub.store.repos.items()):
        seen = not repo.private or hub.store.belongs(query.token, repo.namespace)
        owned = not author or repo.namespace == author
        if kind == query.kind and seen and owned and words in name.lower():
            found.append(_summary(hub, repo, repo.resolve("main")))
    return Answer.json(found[:limit])


def info(hub: HubStandIn, query: Query) -> Answer:
    """A repository at a revision."""
    repo = hub.store.readable(query.kind, query.repo, query.token, content=False)
    at = repo.resolve(query.revision)
    blobs = query.parameter("blobs").lower() in ("true", "1")
    siblings: list[dict[str, Any]] = []
    for path, blob in sorted(at.files.items()):
        one: dict[str, Any] = {"rfilename": path}
        if blobs:
            one |= {"size": blob.size, "blobId": blob.oid}
            if blob.sha256 is not None:
                one["lfs"] = described(path, blob)["lfs"] | {"sha256": blob.sha256}
        siblings.append(one)
    return Answer.json({**_summary(hub, repo, at), "siblings": siblings})


def _summary(hub: HubStandIn, repo: Repo, at: Commit) -> dict[str, Any]:
    card = _card(at)
    tags = [str(tag) for tag in card.get("tags") or []]
    if isinstance(card.get("license"), str):
        tags.append(f"license:{card['license']}")
    return {
        "_id": f"{abs(hash(repo.id)):024x}"[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.namespace,
        "sha": at.sha,
        "lastModified": DATE,
        "createdAt": DATE,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags,
        "pipeline_tag": card.get("pipeline_tag"),
        "library_name": card.get("library_name"),
        "cardData": card,
        "sdk": repo.sdk,
    }


def _card(at: Commit) -> dict[str, Any]:
    readme = at.files.get("README.md")
    text = readme.data.decode() if readme is not None and readme.data is not None else ""
    lines = text.split("\n")
    if lines[0] != "---" or "---" not in lines[1:]:
        return {}
    found = yaml.safe_load("\n".join(lines[1 : 1 + lines[1:].index("---")]))
    return found if isinstance(found, dict) else {}


# -- commits ---------------------------------------------------------------------------------------


def validate_yaml(hub: HubStandIn, query: Query) -> Answer:
    """Whether a card's metadata will do."""
    errors, warnings = metadata.problems(query.json()["content"])
    body = {
        "errors": [{"message": text} for text in errors],
        "warnings": [{"message": text} for text in warnings],
    }
    return Answer.json(body, 400 if errors else 200)


def preupload(hub: HubStandIn, query: Query) -> Answer:
    """Which files are large, and what is there of them already."""
    pull = bool(query.parameter("create_pr"))
    repo = _changing(hub, query, pull)
    at = repo.resolve(query.revision)
    answer = []
    for asked in query.json()["files"]:
        path, size = asked["path"], asked["size"]
        sample = base64.b64decode(asked["sample"])
        one = {"path": path, "shouldIgnore": False}
        one["uploadMode"] = "lfs" if is_large(path, size, sample) else "regular"
        blob = at.files.get(path)
        if blob is not None:
            one["oid"] = blob.sha256 or blob.oid
        answer.append(one)
    return Answer.json({"files": answer, "commitOid": at.sha})


def _changing(hub: HubStandIn, query: Query, pull: bool) -> Repo:
    """A repository to be committed to."""
    ref = None if pull else query.revision
    return hub.store.proposable(query.kind, query.repo, query.token, ref)


def commit(hub: HubStandIn, query: Query) -> Answer:
    """Files, large files and deletions, all or nothing, on top of the parent they were made for."""
    pull = bool(query.parameter("create_pr"))
    repo = _changing(hub, query, pull)
    ref = repo.branch(query.revision)
    header, changes = _changes(query.text(), repo, repo.resolve(ref).files)
    head = repo.refs[ref]
    if header.get("parentCommit") not in (None, head):
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    assert query.token is not None
    title = header.get("summary") or ""
    if pull:
        opened = _open(repo, title, header.get("description") or "", query.token.user, head)
        ref = opened["ref"]
    made = repo.commit(ref, title, changes, query.token.user)
    address = f"{hub.url}/{repo.id}"
    answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{address}/commit/{made.sha}"}
    answer |= {"hookOutput": "", "pullRequestUrl": None}
    if pull:
        answer["pullRequestUrl"] = f"{address}/discussions/{opened['num']}"
    return Answer.json(answer)


def _changes(text: str, repo: Repo, files: Any) -> tuple[dict[str, Any], dict[str, Blob | None]]:
    header: dict[str, Any] | None = None
    changes: dict[str, Blob | None] = {}
    for line in text.splitlines():
        item = json.loads(line)
        kind, value = item["key"], item["value"]
        if kind == "header":
            header = value
            continue
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/") or path.split("/")[0] == ".git":
            raise Refused(400, f"Invalid path {path!r}")
        if kind == "file":
            changes[path] = _small(path, value)
        elif kind == "lfsFile":
            changes[path] = _large(path, value, repo)
        elif kind == "deletedFile":
            changes[path] = None
        elif kind == "deletedFolder":
            changes |= dict.fromkeys(below(files, path))
        else:
            raise Refused(400, f"unknown operation {kind!r}")
    if header is None or not header.get("summary"):
        raise Refused(400, "a commit needs a header with a summary")
    if not changes:
        raise Refused(400, "nothing to commit")
    return header, changes


def _small(path: str, value: dict[str, Any]) -> Blob:
    if value.get("encoding") != "base64":
        raise Refused(400, "files are base64")
    try:
        data = base64.b64decode(value["content"], validate=True)
    except binascii.Error:
        raise Refused(400, f"{path} is not base64") from None
    if len(data) > LIMIT or is_large(path, len(data), data[:512]):
        raise Refused(400, f"Your push was rejected: {path} must be a large file (LFS)")
    if path == "README.md":
        errors, _ = metadata.problems(data.decode())
        if errors:
            raise Refused(400, "Invalid metadata in README.md: " + "; ".join(errors))
    return Blob(len(data), data)


def _large(path: str, value: dict[str, Any], repo: Repo) -> Blob:
    if value.get("algo") != "sha256" or value.get("oid") not in repo.objects:
        raise Refused(400, f"LFS pointer of {path} points to a file that does not exist")
    if repo.objects[value["oid"]] != value.get("size", repo.objects[value["oid"]]):
        raise Refused(400, f"LFS pointer of {path} tells a wrong size")
    return Blob(repo.objects[value["oid"]], sha256=value["oid"])


def commits(hub: HubStandIn, query: Query) -> Answer:
    """The history of a revision."""
    repo = hub.store.readable(query.kind, query.repo, query.token)
    return Answer.json(
        [
            {
                "id": one.sha,
                "title": one.title,
                "message": "",
                "date": DATE,
                "authors": [{"user": one.user}],
            }
            for one in repo.line(query.revision)
        ]
    )


# -- refs ------------------------------------------------------------------------------------------


def refs(hub: HubStandIn, query: Query) -> Answer:
    """Branches, tags and pull requests."""
    repo = hub.store.readable(query.kind, query.repo, query.token)

    def under(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
            for ref, sha in sorted(repo.refs.items())
            if ref.startswith(prefix)
        ]

    found = {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": []}
    if query.parameter("include_prs"):
        found["pullRequests"] = under("refs/pr/")
    return Answer.json(found)


def tag(hub: HubStandIn, query: Query) -> Answer:
    """A tag on a commit; 409 where there is one of the name."""
    repo = hub.store.writable(query.kind, query.repo, query.token)
    return _new_ref(repo, f"refs/tags/{query.json()['tag']}", repo.resolve(query.revision).sha)


def branch(hub: HubStandIn, query: Query) -> Answer:
    """A branch from a commit."""
    repo = hub.store.writable(query.kind, query.repo, query.token)
    start = query.json().get("startingPoint") or "main"
    return _new_ref(repo, f"refs/heads/{query.groups['branch']}", repo.resolve(start).sha)


def _new_ref(repo: Repo, ref: str, sha: str) -> Answer:
    if not NAME.fullmatch(ref.split("/", 2)[2]):
        raise Refused(400, f"Invalid ref name {ref}")
    if ref in repo.refs:
        raise Refused(409, "Reference already exists")
    repo.refs[ref] = sha
    return Answer.json({})


# -- pull requests ---------------------------------------------------------------------------------


def open_pull(hub: HubStandIn, query: Query) -> Answer:
    """A pull request without a commit yet."""
    asked = query.json()
    repo = _changing(hub, query, pull=True)
    if not asked.get("pullRequest"):
        raise Refused(501, "the stand-in has no discussions, only pull requests")
    assert query.token is not None
    head = repo.refs["refs/heads/main"]
    made = _open(repo, asked["title"], asked.get("description") or "", query.token.user, head)
    number = made["num"]
    return Answer.json({"num": number, "url": f"{hub.url}/{repo.id}/discussions/{number}"})


def _open(repo: Repo, title: str, text: str, user: str, head: str) -> dict[str, Any]:
    number = len(repo.pulls) + 1
    ref = f"refs/pr/{number}"
    repo.refs[ref] = head
    made = {"num": number, "title": title, "author": user, "text": text, "ref": ref}
    repo.pulls.append(made)
    return made


def pulls(hub: HubStandIn, query: Query) -> Answer:
    """All pull requests, on one page."""
    repo = hub.store.readable(query.kind, query.repo, query.token)
    found = [] if query.parameter("p", "0") != "0" else [_discussion(repo, p) for p in repo.pulls]
    return Answer.json({"discussions": found, "count": len(repo.pulls), "start": 0})


def pull(hub: HubStandIn, query: Query) -> Answer:
    """One pull request."""
    repo = hub.store.readable(query.kind, query.repo, query.token)
    number = int(query.groups["number"])
    if number > len(repo.pulls):
        raise Refused(404, "Discussion not found")
    one = repo.pulls[number - 1]
    event = {
        "id": secrets.token_hex(12),
        "type": "comment",
        "createdAt": DATE,
        "author": {"name": one["author"]},
        "data": {"latest": {"raw": one["text"], "html": ""}, "edited": False, "hidden": False},
    }
    more = {"events": [event], "filesWithConflicts": [], "changes": {"base": "refs/heads/main"}}
    return Answer.json({**_discussion(repo, one), **more})


def _discussion(repo: Repo, one: dict[str, Any]) -> dict[str, Any]:
    return {
        "num": one["num"],
        "title": one["title"],
        "status": "draft",
        "isPullRequest": True,
        "createdAt": DATE,
        "author": {"name": one["author"]},
        "repo": {"name": repo.id, "type": repo.kind},
        "repoOwner": {"name": repo.namespace},
    }


# -- files -----------------------------------------------------------------------------------------


def tree(hub: HubStandIn, query: Query) -> Answer:
    """Files and folders, in pages."""
    repo = hub.store.readable(query.kind, query.repo, query.token)
    at = repo.resolve(query.revision)
    recursive = query.parameter("recursive").lower() in ("true", "1")
    under = query.groups.get("path", "").strip("/")
    found = list(entries(at.files, under, recursive))
    if under and not found:
        raise Refused(404, f"{under} does not exist on {query.revision!r}", "EntryNotFound")
    start = int(query.parameter("cursor", "0"))
    headers = {}
    if start + hub.page < len(found):
        place = f"{hub.url}/api/{query.groups['kinds']}/{repo.id}/tree/{at.sha}"
        options = f"recursive={recursive}&cursor={start + hub.page}"
        headers["Link"] = f'<{place}?{options}>; rel="next"'
    return Answer.json(found[start : start + hub.page], **headers)


def paths_info(hub: HubStandIn, query: Query) -> Answer:
    """The files among some paths."""
    repo = hub.store.readable(query.kind, query.repo, query.token)
    files = repo.resolve(query.revision).files
    asked = query.form().get("paths", [])
    return Answer.json([described(path, files[path]) for path in asked if path in files])


def resolve(hub: HubStandIn, query: Query) -> Answer:
    """A file; a large one lies elsewhere, under an address that is good for anybody."""
    repo = hub.store.readable(query.kind, query.repo, query.token)
    at = repo.resolve(query.revision)
    path = query.groups["path"]
    blob = at.files.get(path)
    if blob is None:
        raise Refused(404, "Entry not found", "EntryNotFound", commit=at.sha)
    headers = {"X-Repo-Commit": at.sha, "Content-Type": "application/octet-stream"}
    if blob.data is not None:
        return ranged(query, blob.data, {**headers, "ETag": f'"{blob.oid}"'})
    assert blob.sha256 is not None
    key = secrets.token_hex(16)
    hub.downloads[key] = blob.sha256
    headers |= {
        "X-Linked-Size": str(blob.size),
        "X-Linked-ETag": f'"{blob.sha256}"',
        "Location": f"{hub.storage_url}/get/{key}",
    }
    return Answer(302, headers)
