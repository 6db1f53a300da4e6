"""Files shipped beside the code: demo recipes with their adapters, card templates."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource(relative: str) -> Path:
    """The file or folder `relative` (POSIX, below the repository root), wherever it lies.

    A checkout (also an editable install of one) keeps it at the repository root, a wheel below
    `mergekit_unconstrained/_data/` (`force-include` in pyproject.toml).
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
