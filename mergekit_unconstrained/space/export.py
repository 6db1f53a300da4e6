"""A Space that can be deployed: three small files that install this package and serve the page."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi

from mergekit_unconstrained import __version__
from mergekit_unconstrained.errors import MissingExtraError, OutputError
from mergekit_unconstrained.hub.access import connect
from mergekit_unconstrained.space.confine import checked_repository

SCOPES = ("contribute-repos", "gated-repos", "jobs")
RELEASE = f"mergekit-unconstrained[space]=={__version__}"
APP = '''"""The page of mergekit-unconstrained, served for everybody."""

from mergekit_unconstrained.space.app import serve, settings_of_space

serve(settings_of_space())
'''


def files(title: str, requirement: str = RELEASE) -> dict[str, str]:
    """The files of a Space by name. requirement: what pip installs, in one line."""
    wanted = requirement.strip()
    if not wanted or not wanted.isprintable():
        raise OutputError("the requirement is one line, such as pip takes in requirements.txt")
    return {"README.md": readme(title), "requirements.txt": f"{wanted}\n", "app.py": APP}


def readme(title: str) -> str:
    """The Space's card, with what the Hub has to know to run it."""
    front: dict[str, Any] = {
        "title": title,
        "emoji": "🧩",
        "colorFrom": "green",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": _gradio(),
        "python_version": "3.12",
        "app_file": "app.py",
        "license": "apache-2.0",
        "short_description": "Merge or fuse language models",
        "hf_oauth": True,
        "hf_oauth_scopes": list(SCOPES),
    }
    text = yaml.dump(front, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return (
        f"---\n{text}---\n\n"
        "Pick models, see whether and how they can be merged, weigh them by depth and kind of\n"
        "tensor, merge small ones here, and push with your own rights. Everything it does is in\n"
        "[mergekit-unconstrained](https://pypi.org/project/mergekit-unconstrained/).\n"
    )


def write(folder: Path, title: str, requirement: str = RELEASE) -> list[str]:
    """Write a Space into a folder that is new or empty; gives the names of the files."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not empty: choose another folder or remove it")
    made = files(title, requirement)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in made.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}") from error
    return list(made)


def deploy(
    repository: str, *, private: bool = True, requirement: str = RELEASE, api: HfApi | None = None
) -> str:
    """Make or update a Space on the Hub in one commit; gives its address.

    Other files of an existing Space stay. HubError names cause and remedy.
    """
    name = checked_repository(repository)
    hub = connect(api)
    made = files(name.rpartition("/")[2], requirement)
    place = hub.ask(
        lambda: hub.api.create_repo(
            name, repo_type="space", space_sdk="gradio", private=private, exist_ok=True
        ),
        "create the Space",
        name,
    )
    full = str(place.repo_id)
    head = hub.ask(lambda: hub.api.repo_info(full, repo_type="space"), "read", full).sha
    operations = [CommitOperationAdd(n, text.encode("utf-8")) for n, text in made.items()]
    hub.ask(
        lambda: hub.api.create_commit(
            full,
            operations,
            commit_message="Deploy mergekit-unconstrained",
            repo_type="space",
            parent_commit=head,
        ),
        "upload to",
        full,
    )
    return f"{hub.api.endpoint}/spaces/{full}"


def _gradio() -> str:
    try:
        return importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtraError("the Space", "space") from None


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML would read as a number: versions are text."""
