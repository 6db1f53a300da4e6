"""Tiny models in one folder, as a Space sees them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LICENCES = {
    "llama/base": "apache-2.0",
    "llama/expert1": "apache-2.0",
    "llama/expert2": "mit",
    "qwen2/base": "apache-2.0",
    "qwen2/expert1": "cc-by-nc-4.0",
    "qwen2/expert2": None,
}


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory, make_tiny: Callable[..., Any]) -> Path:
    """A folder with a tiny Llama, a tiny Qwen2 and two experts of each, with licences."""
    root = tmp_path_factory.mktemp("space-models")
    for family in ("llama", "qwen2"):
        made = make_tiny(family, experts=2)
        for folder in (made.base, *made.experts):
            shutil.copytree(folder, root / family / folder.name)
    for name, licence in LICENCES.items():
        if licence is not None:
            (root / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n# {name}\n")
    return root
