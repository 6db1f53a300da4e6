"""The files of a finished folder as they will lie on the Hub, with their sizes and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import RepoFile

from mergekit_unconstrained.errors import HubError

SHOWN = (".eval_results", ".gitattributes")
"""Names that begin with a dot and are published all the same."""
BLOCK = 2**20
TEXT_LIMIT = 10 * 2**20


@dataclass(frozen=True)
class LocalFile:
    """One file. name: with `/`, relative to the folder. size: bytes."""

    name: str
    path: Path
    size: int


@dataclass(frozen=True)
class Hashes:
    """sha256 in hex, and git's sha1 of the same bytes."""

    sha256: str
    git: str


def local_files(folder: Path) -> list[LocalFile]:
    """Everything that is published: no names with a dot in front (but SHOWN), nothing half-made.

    HubError where the folder is no finished model.
    """
    if not folder.is_dir():
        raise HubError(f"{folder} is no folder: name the output of a merge")
    found = sorted(_walk(folder), key=lambda file: file.name)
    names = {file.name for file in found}
    if "config.json" not in names or not any(n.endswith((".safetensors", ".bin")) for n in names):
        missing = "config.json" if "config.json" not in names else "weights (*.safetensors)"
        raise HubError(f"{folder} is no finished model: it has no {missing}")
    if "README.md" not in names:
        raise HubError(
            f"{folder} has no README.md: `mergekit-unconstrained card {folder}` writes the card"
        )
    return found


def _walk(folder: Path) -> Iterator[LocalFile]:
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts) and parts[0] not in SHOWN
        if path.is_file() and not hidden and path.suffix != ".partial":
            yield LocalFile("/".join(parts), path, path.stat().st_size)


def hash_all(
    files: list[LocalFile], advance: Callable[[int], None] = lambda _: None, threads: int = 4
) -> dict[str, Hashes]:
    """The hashes of every file by its name. advance: told of bytes as they are read."""

    def one(file: LocalFile) -> Hashes:
        try:
            return hashes_of(file, advance)
        except OSError as error:
            raise HubError(f"{file.path} cannot be read: {error.strerror}") from error

    with ThreadPoolExecutor(threads) as pool:
        return dict(zip((f.name for f in files), pool.map(one, files), strict=True))


def hashes_of(file: LocalFile, advance: Callable[[int], None] = lambda _: None) -> Hashes:
    """Both hashes in one reading."""
    sha256 = hashlib.sha256()
    git = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with file.path.open("rb") as stream:
        while block := stream.read(BLOCK):
            sha256.update(block)
            git.update(block)
            advance(len(block))
    return Hashes(sha256.hexdigest(), git.hexdigest())


def same(file: LocalFile, hashes: Hashes, remote: RepoFile | None) -> bool:
    """Whether the Hub has exactly these bytes."""
    if remote is None or remote.size != file.size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == hashes.sha256
    return remote.blob_id == hashes.git


def differing(
    files: list[LocalFile], hashes: Mapping[str, Hashes], remote: Mapping[str, RepoFile]
) -> list[LocalFile]:
    """The files that the Hub does not have so."""
    return [f for f in files if not same(f, hashes[f.name], remote.get(f.name))]


def refuse_secrets(files: list[LocalFile], secret: str | None) -> None:
    """HubError where a text that would be published holds the token."""
    if not secret:
        return
    for file in files:
        if file.size <= TEXT_LIMIT and secret.encode() in file.path.read_bytes():
            raise HubError(
                f"{file.path} holds your Hub token: take it out (and revoke the token if the file "
                "was ever given away), then run the same command again"
            )
