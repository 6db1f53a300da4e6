"""Large files: what is missing is asked for, comes in by one PUT or in parts, and is checked."""

from __future__ import annotations

import hashlib
import secrets
import shutil
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.hub_stand_in.answer import Answer, Query, ranged
from tests.hub_stand_in.store import Refused, Repo

if TYPE_CHECKING:
    from tests.hub_stand_in.server import HubStandIn


@dataclass
class Upload:
    """One object that may come in. parts: number -> (etag, file) of those that are there."""

    repo: Repo
    sha256: str
    size: int
    parts: dict[int, tuple[str, Path]] = field(default_factory=dict)


def batch(hub: HubStandIn, query: Query) -> Answer:
    """Which objects are to be sent, and where to; those that are there have no actions."""
    asked = query.json()
    if asked.get("operation") != "upload" or asked.get("hash_algo", "sha256") != "sha256":
        raise Refused(400, "only uploads by sha256")
    ref = (asked.get("ref") or {}).get("name")
    repo = hub.store.proposable(query.kind, query.repo, query.token, ref)
    return Answer.json(
        {"transfer": "basic", "objects": [_actions(hub, repo, one) for one in asked["objects"]]}
    )


def _actions(hub: HubStandIn, repo: Repo, asked: dict[str, Any]) -> dict[str, Any]:
    sha256, size = asked["oid"], asked["size"]
    found: dict[str, Any] = {"oid": sha256, "size": size}
    if sha256 in repo.objects:
        return found
    key = secrets.token_hex(16)
    hub.uploads[key] = Upload(repo, sha256, size)
    kind = "" if repo.kind == "model" else f"{repo.kind}s/"
    verify = {"href": f"{hub.url}/{kind}{repo.id}.git/info/lfs/verify", "header": {}}
    upload: dict[str, Any] = {"href": f"{hub.storage_url}/put/{key}", "header": {}}
    if size > hub.multipart_above:
        parts = range(1, ceil(size / hub.part_size) + 1)
        header = {str(n): f"{hub.storage_url}/part/{key}/{n}" for n in parts}
        upload["href"] = f"{hub.url}/lfs/complete/{key}"
        upload["header"] = {"chunk_size": str(hub.part_size), **header}
    return {**found, "authenticated": True, "actions": {"upload": upload, "verify": verify}}


def _upload(hub: HubStandIn, query: Query) -> Upload:
    if "Authorization" in query.headers:
        raise Refused(400, "Only one auth mechanism allowed: the address is signed already")
    if query.groups["key"] not in hub.uploads:
        raise Refused(403, "Request has expired")
    return hub.uploads[query.groups["key"]]


def put(hub: HubStandIn, query: Query) -> Answer:
    """A whole object."""
    upload = _upload(hub, query)
    hub.store.receive(query.body, upload.repo, upload.sha256, upload.size)
    return Answer(200, {"ETag": f'"{upload.sha256[:32]}"'})


def put_part(hub: HubStandIn, query: Query) -> Answer:
    """A part of an object, kept until all are there."""
    upload = _upload(hub, query)
    number = int(query.groups["part"])
    count = ceil(upload.size / hub.part_size)
    last = upload.size - (count - 1) * hub.part_size
    wanted = hub.part_size if number < count else last
    if number > count or query.body.stat().st_size != wanted:
        raise Refused(400, f"part {number} has {query.body.stat().st_size} bytes, not {wanted}")
    etag = f'"{hashlib.md5(query.body.read_bytes()).hexdigest()}"'
    kept = hub.store.incoming()
    query.body.replace(kept)
    upload.parts[number] = etag, kept
    return Answer(200, {"ETag": etag})


def complete(hub: HubStandIn, query: Query) -> Answer:
    """Put the parts together."""
    upload = hub.uploads.get(query.groups["key"])
    if upload is None:
        raise Refused(403, "Request has expired")
    told = query.json()
    given = [(part["partNumber"], part["etag"]) for part in told["parts"]]
    known = [(number, etag) for number, (etag, _) in sorted(upload.parts.items())]
    if told.get("oid") != upload.sha256 or given != known:
        raise Refused(400, f"InvalidPart: {given} told, {known} here")
    whole = hub.store.incoming()
    with whole.open("wb") as stream:
        for _, (_, path) in sorted(upload.parts.items()):
            with path.open("rb") as part:
                shutil.copyfileobj(part, stream)
    hub.store.receive(whole, upload.repo, upload.sha256, upload.size)
    for _, path in upload.parts.values():
        path.unlink()
    upload.parts.clear()
    return Answer.json({})


def verify(hub: HubStandIn, query: Query) -> Answer:
    """Whether an object is there as announced."""
    repo = hub.store.proposable(query.kind, query.repo, query.token, None)
    told = query.json()
    if repo.objects.get(told["oid"]) != told["size"]:
        raise Refused(404, "Object not found")
    return Answer.json({})


def get(hub: HubStandIn, query: Query) -> Answer:
    """A large file, by the signed address that `resolve` gave."""
    if "Authorization" in query.headers:
        raise Refused(400, "Only one auth mechanism allowed: the address is signed already")
    sha256 = hub.downloads.get(query.groups["key"])
    if sha256 is None:
        raise Refused(403, "Request has expired")
    headers = {"ETag": f'"{sha256}"', "Content-Type": "application/octet-stream"}
    return ranged(query, hub.store.object(sha256), headers)
