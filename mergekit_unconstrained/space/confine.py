"""What people type, held inside the Space's folders and inside limits.

Names, recipes and repository names come from anybody. A name is a Hub id or a plain relative path
below the folder of models; nothing reaches a file through a link, `..` or an absolute path; a
recipe is small, without aliases (a few of which can stand for gigabytes), not nested without end.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import yaml

from mergekit_unconstrained.errors import ModelError, OutputError, RecipeError

MAX_NAME = 200
MAX_RECIPE = 64 * 1024
MAX_MODELS = 8
MAX_DEPTH = 30
MAX_LISTED = 200

_PART = r"[A-Za-z0-9_][\w.-]*"
_LOCAL = re.compile(rf"{_PART}(?:/{_PART})*", re.ASCII)
_HUB_ID = re.compile(rf"{_PART}/{_PART}(?:@[\w.-]+)?", re.ASCII)
_REPO = re.compile(rf"(?:{_PART}/)?{_PART}", re.ASCII)


def checked_name(name: object) -> str:
    """A model's name without surrounding blanks; ModelError for what cannot be one."""
    text = str(name).strip()
    if not text:
        raise ModelError("a model has an empty name")
    if len(text) > MAX_NAME:
        raise ModelError(f"a name of {len(text):,} characters: {MAX_NAME} are the limit")
    if ".." in text or not (_LOCAL.fullmatch(text) or _HUB_ID.fullmatch(text)):
        raise ModelError(
            f"{shown(text)} is no model's name: a Hub id such as org/name or org/name@revision, or "
            "a folder in the list (letters, digits, . _ - and /)"
        )
    return text


def is_hub_id(name: str) -> bool:
    """Whether a name may be one of the Hub's."""
    return _HUB_ID.fullmatch(name) is not None


def checked_repository(name: object) -> str:
    """The name of a repository to push to; OutputError for what cannot be one."""
    text = str(name).strip()
    good = len(text) <= 96 + 1 + 96 and _REPO.fullmatch(text) and ".." not in text
    if not good or "--" in text or text.endswith((".git", ".ipynb", "-", ".")):
        raise OutputError(f"{shown(text)} is no repository's name: write owner/name")
    return text


def shown(text: str) -> str:
    """Text from elsewhere within a message: quoted, on one line, not endless."""
    quoted = repr(text)
    return quoted if len(quoted) <= 60 else quoted[:57] + "...'"


def inside(root: Path, relative: str) -> Path:
    """The path of `relative` below root; ModelError where it would leave it or follows a link."""
    folder = root.resolve()
    path = folder / relative
    if Path(relative).is_absolute() or "\\" in relative or "\0" in relative:
        raise ModelError(f"{shown(relative)} is no folder in the list")
    if not path.resolve().is_relative_to(folder):
        raise ModelError(f"{shown(relative)} lies outside the folder of models")
    for part in (path, *path.parents):
        if part == folder:
            return path
        if part.is_symlink():
            raise ModelError(f"{shown(relative)} is reached through a link, which is not followed")
    raise ModelError(f"{shown(relative)} lies outside the folder of models")


def local_models(root: Path) -> list[str]:
    """Names of the model folders below root, two levels deep at most, links left out."""
    found: list[str] = []
    for folder in (*_folders(root), *(f for top in _folders(root) for f in _folders(top))):
        name = folder.relative_to(root).as_posix()
        if (folder / "config.json").is_file() and _LOCAL.fullmatch(name) and len(name) <= MAX_NAME:
            found.append(name)
    return sorted(found)[:MAX_LISTED]


def _folders(root: Path) -> list[Path]:
    try:
        with os.scandir(root) as entries:
            return [Path(e.path) for e in entries if e.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def local_model(root: Path, name: str) -> Path | None:
    """The folder of a model that lies here, None where there is none of that name.

    ModelError where it is not made of plain files, or has no safetensors.
    """
    path = inside(root, checked_name(name).partition("@")[0])
    if "@" in name or not path.is_dir():
        return None
    check_files(path, name)
    return path


def check_files(folder: Path, name: str) -> None:
    """Refuse links, indices that point elsewhere, and weights that are pickles."""
    for entry in folder.iterdir():
        if entry.is_symlink():
            raise ModelError(f"{name}: {shown(entry.name)} is a link, which is not followed")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        check_index(index.read_bytes(), name)
    elif not (folder / "model.safetensors").is_file():
        raise ModelError(
            f"{name} has no model.safetensors: pickles (*.bin) can run code when they are read and "
            "are not taken here; convert them with `save_pretrained`"
        )


def check_index(content: bytes, name: str) -> list[str]:
    """The shards that a safetensors index names; ModelError unless all are plain file names."""
    try:
        shards = sorted({str(s) for s in json.loads(content)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{name}: model.safetensors.index.json is damaged: {error}") from None
    for shard in shards:
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", shard, re.ASCII):
            raise ModelError(f"{name}: its index names {shown(shard)}, which is no plain file")
    return shards


def check_recipe_text(text: str, name: str = "recipe") -> str:
    """A recipe's text within the limits; RecipeError before a parser could choke on it."""
    size = len(text.encode("utf-8", errors="replace"))
    if size > MAX_RECIPE:
        raise RecipeError(f"{name}: {size:,} bytes; {MAX_RECIPE:,} are the limit here")
    depth = 0
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
                line = token.start_mark.line + 1
                raise RecipeError(f"{name}:{line}: aliases are not taken here; write it out")
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if depth > MAX_DEPTH:
                line = token.start_mark.line + 1
                raise RecipeError(f"{name}:{line}: nested more than {MAX_DEPTH} deep")
    except yaml.YAMLError:
        pass  # the strict reader says what is wrong, and where
    return text


_OPENING = (
    yaml.BlockMappingStartToken
    | yaml.BlockSequenceStartToken
    | yaml.FlowMappingStartToken
    | yaml.FlowSequenceStartToken
)
_CLOSING = yaml.BlockEndToken | yaml.FlowMappingEndToken | yaml.FlowSequenceEndToken
