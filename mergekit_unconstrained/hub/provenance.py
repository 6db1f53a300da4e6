"""provenance.json: what a finished folder was made of, from and with, and the hash of every file.

A program's file: everything that the card says is in it, in the recipe and in the reports beside
it, so that the card can be written again from the folder alone, and the folder can be checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from mergekit_unconstrained.engine import journal, staging
from mergekit_unconstrained.engine.digest import sha256
from mergekit_unconstrained.engine.files import replacing
from mergekit_unconstrained.errors import OutputError
from mergekit_unconstrained.hub.facts import DataSet, Fusion, Method, Parent, Source, WeightFile

FILE = "provenance.json"
REWRITTEN = ("README.md", "LICENSE.md", FILE)
"""Files of a folder that may be written again: the card, the terms beside it, and this file."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SCHEMA: Literal[1] = 1


class Provenance(BaseModel):
    """What is known of a finished folder.

    recipe, coefficients, settings, heatmap: names of files in it. weights: of every expert, by kind
    of tensor, one number a layer (null where the layer has none), or one in all outside the layers.
    flags: mergekit's options without which the recipe gives something else. files: all but those
    that may be rewritten. digest: sha256 of this file's content without it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = SCHEMA
    title: str
    method: Method
    parents: tuple[Parent, ...]
    data: tuple[DataSet, ...] = ()
    recipe: str
    coefficients: str | None = None
    settings: str | None = None
    heatmap: str | None = None
    weights: dict[str, dict[str, list[float | None]]] = {}
    flags: tuple[str, ...] = ()
    seeds: dict[str, int] = {}
    tokenizer: str = ""
    chat_template: bool = False
    dtype: str = ""
    fusion: Fusion | None = None
    versions: dict[str, str]
    machine: dict[str, str]
    seconds: float
    unknown: tuple[str, ...] = ()
    repo_id: str | None = None
    tag: str | None = None
    quantised: tuple[str, ...] = ()
    files: tuple[WeightFile, ...] = ()
    digest: str = ""

    @field_validator("files")
    @classmethod
    def _inside(cls, files: tuple[WeightFile, ...]) -> tuple[WeightFile, ...]:
        for file in files:
            inside(file.name)
        return files

    @field_validator("recipe", "coefficients", "settings", "heatmap")
    @classmethod
    def _file(cls, name: str | None) -> str | None:
        return name if name is None else inside(name)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every model and adapter once."""
        return tuple(dict.fromkeys(s for p in self.parents for s in p.sources))


@dataclass(frozen=True)
class Problem:
    """What is not as provenance.json says. remedy: what to do about it."""

    file: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}; {self.remedy}"


def inside(name: str) -> str:
    """A path that stays within its folder; ValueError for any other one."""
    path = PurePosixPath(name)
    bad = not name or "\\" in name or ":" in name or "\0" in name
    if bad or path.is_absolute() or ".." in path.parts or name.startswith("~"):
        raise ValueError(f"{name!r} is not a path within the folder")
    return name


# -- writing and reading --------------------------------------------------------------------------


def write(
    folder: Path, provenance: Provenance, known: Mapping[str, str] | None = None
) -> Provenance:
    """Write provenance.json with the hashes of all that lies in the folder; gives what was written.

    known: sha256 of files that need not be read for it.

    The last step but the card: what is added later is not known to it (but see `amended`).
    """
    files = tuple(_hashed(folder, name, (known or {}).get(name)) for name in listed_files(folder))
    return save(folder, provenance.model_copy(update={"files": files}))


def save(folder: Path, provenance: Provenance) -> Provenance:
    """Write provenance.json as it is, with a new digest."""
    done = provenance.model_copy(update={"digest": _digest(provenance)})
    with replacing(folder / FILE) as stream:
        stream.write((done.model_dump_json(indent=2) + "\n").encode())
    return done


def amended(folder: Path, provenance: Provenance, name: str) -> Provenance:
    """With the hash of one file that was added or replaced on purpose; not saved."""
    others = tuple(f for f in provenance.files if f.name != name)
    files = tuple(sorted((*others, _hashed(folder, name)), key=lambda f: f.name))
    return provenance.model_copy(update={"files": files})


def load(folder: Path) -> Provenance:
    """Read a folder's provenance.json; OutputError when there is none or it cannot be read."""
    try:
        text = (folder / FILE).read_bytes()
    except FileNotFoundError:
        raise OutputError(
            f"{folder} has no {FILE}: it was made by another program, by an older release, or by "
            "one of mergekit's own methods, whose results have mergekit's card"
        ) from None
    except OSError as error:
        raise OutputError(f"{folder / FILE} cannot be read: {error.strerror}") from None
    return parse(text, str(folder / FILE))


def parse(text: bytes, name: str) -> Provenance:
    """Provenance from its JSON; OutputError names what is wrong with it. name: for the message."""
    try:
        version = json.loads(text)["schema_version"]
        if version != SCHEMA:
            raise OutputError(f"{name} has schema {version!r}, and this release reads {SCHEMA}")
        return Provenance.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise OutputError(f"{name} is damaged: {place}: {first['msg']}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{name} is damaged: {type(error).__name__}: {error}") from None


def listed_files(folder: Path) -> list[str]:
    """The files of a folder whose bytes matter, as paths within it; hidden ones do not."""
    found = (f.relative_to(folder) for f in folder.rglob("*") if f.is_file())
    shown = (path for path in found if not any(part.startswith(".") for part in path.parts))
    return sorted({path.as_posix() for path in shown} - {*REWRITTEN, staging.NOTE, journal.NAME})


def _hashed(folder: Path, name: str, known: str | None = None) -> WeightFile:
    file = folder / name
    return WeightFile(name, known or sha256(file), file.stat().st_size)


def _digest(provenance: Provenance) -> str:
    content = provenance.model_dump(mode="json", exclude={"digest"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# -- checking -------------------------------------------------------------------------------------


def verify(folder: Path, parents: Mapping[str, Path] | None = None) -> list[Problem]:
    """Every file of a folder that is not as provenance.json says; empty when all are.

    parents: also check the weights of these local parents, by their place in the recipe.
    """
    found = load(folder)
    own = "this folder" if folder.name in ("", ".") else folder.name
    problems = sealed(found)
    for file in found.files:
        problems += compare(file, folder / file.name, f"copy it again, or make {own} anew")
    known = {file.name for file in found.files}
    for name in listed_files(folder):
        if name not in known and name.endswith(WEIGHTS):
            what = f"is no file that {FILE} knows"
            problems.append(Problem(name, what, "remove it if you did not put it there"))
    for source in found.sources:
        if parents and source.place is not None and source.place in parents:
            problems += verify_parent(source, parents[source.place])
    return problems


def sealed(provenance: Provenance) -> list[Problem]:
    """Whether provenance.json is what was written."""
    if provenance.digest == _digest(provenance):
        return []
    remedy = "its other statements cannot be relied on; fetch it again"
    return [Problem(FILE, "was changed after it was written", remedy)]


def verify_parent(source: Source, folder: Path) -> list[Problem]:
    """Whether a local parent's weights are those that were read."""
    remedy = f"find the version of {source.name} that was merged"
    return [
        Problem(f"{source.name}/{problem.file}", problem.what, remedy)
        for file in source.files
        for problem in compare(file, folder / file.name, remedy)
    ]


def compare(file: WeightFile, path: Path, remedy: str) -> list[Problem]:
    """One file against its hash and size."""
    if not path.is_file():
        return [Problem(file.name, "is missing", remedy)]
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return [Problem(file.name, f"has {size:,} bytes instead of {file.size:,}", remedy)]
    if _contents(path) != file.sha256:
        return [Problem(file.name, "has other contents (sha256 differs)", remedy)]
    return []


def _contents(path: Path) -> str:
    """The hash of what is really there: a blob of the Hub's cache is not trusted by its name."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify_repo(repo_id: str, revision: str | None = None) -> list[Problem]:
    """The same of a repository on the Hub, at one commit, without fetching its weights.

    Large files are compared by the sha256 that the Hub stores them under, small ones are fetched.
    OutputError when the repository or its provenance.json cannot be read.
    """
    from huggingface_hub import HfApi, RepoFile, hf_hub_download

    api = HfApi()
    try:
        commit = api.model_info(repo_id, revision=revision).sha
        there = {
            entry.path: entry
            for entry in api.list_repo_tree(repo_id, recursive=True, revision=commit)
            if isinstance(entry, RepoFile)
        }
        if FILE not in there:
            raise OutputError(f"{repo_id} has no {FILE}: it was not made by this program")
        path = hf_hub_download(repo_id, FILE, revision=commit)
        found = parse(Path(path).read_bytes(), f"{repo_id}/{FILE}")
        problems = sealed(found)
        remedy = "push the folder again"
        for file in found.files:
            entry = there.get(file.name)
            if entry is None:
                problems.append(Problem(file.name, "is missing", remedy))
            elif entry.lfs is not None:
                if entry.lfs.sha256 != file.sha256:
                    what = "has other contents (sha256 differs)"
                    problems.append(Problem(file.name, what, remedy))
            else:
                local = Path(hf_hub_download(repo_id, file.name, revision=commit))
                problems += compare(file, local, remedy)
    except OutputError:
        raise
    except Exception as error:  # each transport has its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OutputError(
            f"{repo_id} cannot be read from the Hub (mistyped? private or gated without a token? "
            f"offline?): {reason}"
        ) from error
    return [*problems, *_strangers(there, found.files)]


def _strangers(there: Iterable[str], files: Iterable[WeightFile]) -> list[Problem]:
    known = {file.name for file in files}
    return [
        Problem(name, f"is no file that {FILE} knows", "remove it if you did not put it there")
        for name in sorted(there)
        if name not in known and name.endswith(WEIGHTS)
    ]
