"""What the stand-in keeps: users and tokens, repositories with commits and refs, large files."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Role = Literal["write", "read", "fineGrained"]
SHA = re.compile(r"[0-9a-f]{40}")
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
LIMIT = 10 * 2**20  # of a file that is no LFS object
LARGE = (
    *("*.7z", "*.arrow", "*.bin", "*.bz2", "*.ckpt", "*.ftz", "*.gz", "*.h5", "*.joblib"),
    *("*.model", "*.msgpack", "*.npy", "*.npz", "*.onnx", "*.ot", "*.parquet", "*.pb", "*.pickle"),
    *("*.pkl", "*.pt", "*.pth", "*.rar", "*.safetensors", "*.tar", "*.tflite", "*.tgz", "*.wasm"),
    *("*.xz", "*.zip", "*.zst"),
)
ATTRIBUTES = "".join(f"{p} filter=lfs diff=lfs merge=lfs -text\n" for p in LARGE).encode()


class Refused(Exception):  # noqa: N818
    """An answer other than 200. code: of the header X-Error-Code, which the client reads."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass(frozen=True)
class Token:
    """Who sends a request. namespaces: of a fine-grained token, where it may write."""

    user: str
    role: Role = "write"
    namespaces: tuple[str, ...] = ()


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its bytes, or the sha256 of a large file."""

    size: int
    data: bytes | None = None
    sha256: str | None = None

    @property
    def oid(self) -> str:
        """Git's name for it; of a large file, for its pointer."""
        data = self.data if self.data is not None else self.pointer
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git has in the place of a large file."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
        return f"{text}size {self.size}\n".encode()


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    sha: str
    parent: str | None
    title: str
    files: Mapping[str, Blob]
    user: str


@dataclass
class Repo:
    """One repository. objects: sha256 -> size of the large files it has, committed or not."""

    id: str
    kind: str = "model"
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    sdk: str | None = None
    refs: dict[str, str] = field(default_factory=dict)
    history: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, int] = field(default_factory=dict)
    pulls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        """The owner."""
        return self.id.partition("/")[0]

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag, refs/pr/1 or a sha."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.history[self.refs[ref]]
        if SHA.fullmatch(revision) and revision in self.history:
            return self.history[revision]
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def branch(self, revision: str) -> str:
        """The full name of what can be committed to."""
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if ref not in self.refs or ref.startswith("refs/tags/"):
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return ref

    def line(self, revision: str = "main") -> list[Commit]:
        """The commits of a revision, the newest first."""
        found = [self.resolve(revision)]
        while found[-1].parent is not None:
            found.append(self.history[found[-1].parent])
        return found

    def commit(self, ref: str, title: str, changes: Mapping[str, Blob | None], user: str) -> Commit:
        """Add a commit on top of a ref; None takes a file away."""
        parent = self.refs.get(ref)
        files = dict(self.history[parent].files) if parent else {}
        for path, blob in changes.items():
            if blob is None:
                files.pop(path, None)
            else:
                files[path] = blob
        listing = "".join(f"{p} {b.oid}\n" for p, b in sorted(files.items()))
        text = f"{parent}\n{title}\n{user}\n{len(self.history)}\n{listing}"
        made = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, title, files, user)
        self.history[made.sha] = made
        self.refs[ref] = made.sha
        return made


class Store:
    """Everything, behind one lock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.RLock()
        self.tokens: dict[str, Token] = {}
        self.members: dict[str, tuple[str, ...]] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self._parts = itertools.count()
        (root / "objects").mkdir(parents=True, exist_ok=True)
        (root / "incoming").mkdir(exist_ok=True)

    # -- rights ------------------------------------------------------------------------------------

    def may_write(self, token: Token | None, namespace: str) -> bool:
        """Whether a token may write into a namespace."""
        if token is None or token.role == "read":
            return False
        if token.role == "fineGrained":
            return namespace in token.namespaces
        return self.belongs(token, namespace)

    def belongs(self, token: Token | None, namespace: str) -> bool:
        """Whether a namespace is the user's own or an organisation's of theirs."""
        own = () if token is None else (token.user, *self.members.get(token.user, ()))
        return namespace in own

    def readable(self, kind: str, name: str, token: Token | None, content: bool = True) -> Repo:
        """A repository that a token may see. content: whether its files are asked for."""
        repo = self.repos.get((kind, name))
        if repo is None or (repo.private and not self.belongs(token, repo.namespace)):
            if token is None:
                raise Refused(401, "Invalid username or password.")
            raise Refused(404, "Repository not found", "RepoNotFound")
        own = self.belongs(token, repo.namespace) or (token and token.user in repo.readers)
        if content and repo.gated and not own:
            text = f"Access to {kind} {name} is restricted and you are not in the authorized list."
            raise Refused(403 if token else 401, text, "GatedRepo")
        return repo

    def writable(self, kind: str, name: str, token: Token | None) -> Repo:
        """A repository that a token may change."""
        repo = self.readable(kind, name, token)
        if not self.may_write(token, repo.namespace):
            raise Refused(403, "Forbidden: you need write access to this repository")
        return repo

    def proposable(self, kind: str, name: str, token: Token | None, ref: str | None) -> Repo:
        """A repository that a token may send files to: to a pull request of its user's own, or
        (no ref) to one that is being opened, reading it is enough."""
        repo = self.readable(kind, name, token)
        own = ref is None or any(
            (p["ref"], p["author"]) == (ref, token and token.user) for p in repo.pulls
        )
        if token is None or token.role == "read" or not own:
            return self.writable(kind, name, token)
        return repo

    # -- repositories ------------------------------------------------------------------------------

    def create(self, kind: str, name: str, private: bool, user: str, sdk: str | None) -> Repo:
        """A new repository with the Hub's own first commit."""
        repo = Repo(name, kind, private, sdk=sdk)
        self.repos[kind, name] = repo
        first = {".gitattributes": Blob(len(ATTRIBUTES), ATTRIBUTES)}
        repo.commit("refs/heads/main", "initial commit", first, user)
        return repo

    def put(self, name: str, files: Mapping[str, bytes | Path], kind: str = "model") -> Repo:
        """A repository with files, made without a request; for a test's parents."""
        with self.lock:
            owner = name.partition("/")[0]
            repo = self.repos.get((kind, name)) or self.create(kind, name, False, owner, None)
            changes = {}
            for path, content in files.items():
                data = content.read_bytes() if isinstance(content, Path) else content
                blob = Blob(len(data), data)
                if is_large(path, len(data), data[:512]):
                    blob = Blob(len(data), sha256=hashlib.sha256(data).hexdigest())
                    self.object(blob.sha256 or "").write_bytes(data)
                    repo.objects[blob.sha256 or ""] = blob.size
                changes[path] = blob
            repo.commit("refs/heads/main", "files", changes, owner)
            return repo

    # -- large files -------------------------------------------------------------------------------

    def object(self, sha256: str) -> Path:
        """Where a large file lies."""
        return self.root / "objects" / sha256

    def incoming(self) -> Path:
        """A new file for a body that comes in."""
        return self.root / "incoming" / str(next(self._parts))

    def receive(self, path: Path, repo: Repo, sha256: str, size: int) -> None:
        """Take a whole large file in, if it is what was announced."""
        found = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(2**20):
                found.update(block)
        length = path.stat().st_size
        if (found.hexdigest(), length) != (sha256, size):
            path.unlink()
            raise Refused(400, f"BadDigest: {length} bytes of {found.hexdigest()}, not {sha256}")
        path.replace(self.object(sha256))
        repo.objects[sha256] = size


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether a file goes to the large file storage: by name, size, or as it is binary."""
    by_name = any(fnmatch.fnmatch(path.rpartition("/")[2], pattern) for pattern in LARGE)
    return size > 0 and (by_name or size > LIMIT or b"\0" in sample)


def entries(files: Mapping[str, Blob], under: str, recursive: bool) -> Iterator[dict[str, Any]]:
    """Files and folders below a path, as the tree endpoint tells them."""
    prefix = f"{under}/" if under else ""
    folders: set[str] = set()
    for path in sorted(files):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts)) if recursive else range(1, min(len(parts), 2)):
            folder = prefix + "/".join(parts[:depth])
            if folder not in folders:
                folders.add(folder)
                oid = hashlib.sha1(folder.encode()).hexdigest()
                yield {"type": "directory", "oid": oid, "size": 0, "path": folder}
        if recursive or len(parts) == 1:
            yield described(path, files[path])


def described(path: str, blob: Blob) -> dict[str, Any]:
    """One file, as the tree endpoint tells it."""
    found = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.sha256 is not None:
        lfs = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
        found["lfs"] = lfs
    return found


def below(files: Iterable[str], folder: str) -> list[str]:
    """The files of a folder."""
    return [path for path in files if path.startswith(folder.rstrip("/") + "/")]
