"""Files shipped beside the code, and the folder for what is fetched or made once."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource(relative: str) -> Path:
    """The file or folder `relative` (POSIX, below the repository root), wherever it lies.

    A checkout (also an editable install of one) keeps it at the repository root, a wheel below
    `mergekit_unconstrained/_data/` (`wheel.sources` in pyproject.toml).
    """
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "recipes").is_dir():
        root = checkout
    else:
        root = _PACKAGE / "_data"
    path = root / relative
    if not path.exists():
        raise FileNotFoundError(f"{relative} is not part of this installation (looked in {root})")
    return path


def cache_dir() -> Path:
    """Where fetched models and merged adapters are kept.

    $MERGEKIT_UNCONSTRAINED_CACHE, else ~/.cache/mergekit-unconstrained.
    """
    chosen = os.environ.get("MERGEKIT_UNCONSTRAINED_CACHE") or "~/.cache/mergekit-unconstrained"
    return Path(chosen).expanduser()
