"""What to type for a merge that is too big to run here."""

from __future__ import annotations

import json
import shlex

from mergekit_unconstrained import __version__
from mergekit_unconstrained.space.state import Way

FLAVOR = "cpu-xl"
GPU_FLAVOR = "a100-large"
SCRIPT = "merge_job.py"


def terminal(name: str, repository: str = "") -> str:
    """The commands for a machine of one's own, recipe.yml being in the current folder."""
    lines = [
        'pip install "mergekit-unconstrained"',
        "mergekit-unconstrained plan recipe.yml",
        shlex.join(["mergekit-yaml", "recipe.yml", name]),
    ]
    if repository:
        lines.append(shlex.join(["mergekit-unconstrained", "push", name, repository, "--private"]))
    return "\n".join(lines)


def job(way: Way) -> str:
    """The command that runs SCRIPT on a machine of the Hub's, with the caller's own token."""
    flavor = FLAVOR if way == "layerwise" else GPU_FLAVOR
    options = ["--flavor", flavor, "--timeout", "6h", "--secrets", "HF_TOKEN"]
    return shlex.join(["hf", "jobs", "uv", "run", *options, SCRIPT])


def job_script(recipe: str, name: str, repository: str) -> str:
    """SCRIPT: merges and pushes to a private repository. All that people wrote is JSON in it."""
    return f"""\
# /// script
# requires-python = ">=3.11"
# dependencies = ["mergekit-unconstrained[fusion]=={__version__}"]
# ///
\"\"\"Merge by the recipe below and push the result to a private repository.\"\"\"

import json
import pathlib
import subprocess

RECIPE = json.loads({json.dumps(json.dumps(recipe))})
OUT = json.loads({json.dumps(json.dumps(name))})
REPOSITORY = json.loads({json.dumps(json.dumps(repository))})

pathlib.Path("recipe.yml").write_text(RECIPE, encoding="utf-8")
subprocess.run(["mergekit-unconstrained", "yaml", "recipe.yml", OUT], check=True)
subprocess.run(["mergekit-unconstrained", "push", OUT, REPOSITORY, "--private"], check=True)
"""
