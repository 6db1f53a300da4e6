"""Who may import whom, read from the syntax trees: the layers of the package, lowest first."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mergekit_unconstrained"
NAME = PACKAGE.name

LAYERS: tuple[set[str], ...] = (
    {"errors", "resources", "quick_start"},
    {"catalog"},
    {"compat"},
    {"plugins"},
    {"numerics"},
    {"config"},
    {"engine"},
    {"methods", "fusion", "evaluation", "search"},  # never each other, but see SCORING
    {"hub"},
    {"present"},
    {"jobs"},
    {"_activate"},  # held to more than its place by a test of its own
    {"describe"},
    {"demo"},
    {"space"},
    {"cli_card", "cli_evaluation", "cli_hub", "cli_search", "cli_space"},
    {"cli"},
)
SCORING = ("search", "evaluation")  # a search asks the evaluation for scores
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Every module a file imports, wherever in the file; `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((f"{prefix}.{alias.name}", node) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((a.value, node) for a in node.args[:1] if isinstance(a, ast.Constant))


def unit_of(path: Path) -> str:
    """The part of the package a file belongs to: a folder, or a module at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def violations(source: str, module: str) -> list[str]:
    """What a file of our package imports and should not. module: as in methods/layerwise."""
    unit = module.partition("/")[0]
    found = []
    for name, _ in imports(ast.parse(source)):
        package, _, rest = name.partition(".")
        if package == "":
            found.append(f"{name}: relative")
        if package == "mergekit" and unit not in ("compat", "_activate", "quick_start"):
            found.append(f"{name}: only compat, _activate and quick_start import mergekit")
        other = rest.partition(".")[0]
        if package != NAME or other not in RANK:
            continue
        inside = other == unit != "methods"  # a method never imports another method
        lower = RANK[other] < RANK[unit] or (unit, other) == SCORING
        if not inside and not lower and unit != "_activate":
            found.append(f"{name}: {unit} is not above {other}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_below(path):
    unit = unit_of(path)
    assert unit in RANK or unit == "__init__", "a new part of the package needs a place in LAYERS"
    module = str(path.relative_to(PACKAGE).with_suffix(""))
    assert violations(path.read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("numerics/select", "from mergekit_unconstrained.config.table import Table"),
        ("numerics/select", "from mergekit_unconstrained import compat, jobs"),
        ("config/table", "def f():\n    import mergekit_unconstrained.engine.plan"),
        ("engine/plan", "def f():\n    from mergekit.plan import MergePlanner"),
        ("hub/card", "import importlib\nimportlib.import_module('mergekit.card')"),
        ("methods/a", "from mergekit_unconstrained.methods.layerwise import layerwise"),
        ("methods/a", "from mergekit_unconstrained.search import genome"),
        ("evaluation/tasks", "from mergekit_unconstrained.search import genome"),
        ("resources", "from mergekit_unconstrained.catalog import CATALOG"),
        ("config/table", "from . import document"),
    ],
)
def test_the_rule_sees(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("compat", "from mergekit.merge import run_merge"),
        ("engine/plan", "import mergekit_unconstrained\nfrom mergekit_unconstrained import compat"),
        ("search/driver", "from mergekit_unconstrained.evaluation import scoring"),
        ("jobs", "import torch\nfrom mergekit_unconstrained import __version__, hub"),
    ],
)
def test_the_rule_allows(module, source):
    assert violations(source, module) == []


def test_the_hook_imports_the_standard_library_and_ours_only_when_called():
    tree = ast.parse((PACKAGE / "_activate.py").read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inner = {node for function in functions for _, node in imports(function)}
    for name, node in imports(tree):
        if node in inner:
            assert name in (f"{NAME}.plugins", f"{NAME}.jobs")
        else:
            assert name.partition(".")[0] in sys.stdlib_module_names


def test_the_package_file_holds_the_version_and_nothing_else():
    (statement,) = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(statement, ast.Assign)
    assert ast.unparse(statement.targets[0]) == "__version__"


def test_there_is_no_drawer_for_odds_and_ends():
    names = {path.stem for path in MODULES} | {path.parent.name for path in MODULES}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc"}


def test_what_every_import_of_torch_runs_is_light():
    code = """
import sys

def loaded(*names):
    return [name for name in names if name in sys.modules]

import mergekit_unconstrained, mergekit_unconstrained._activate, mergekit_unconstrained.catalog
assert not loaded("torch", "mergekit", "click", "pydantic", "numpy", "transformers", "yaml")
import mergekit_unconstrained.errors, mergekit_unconstrained.cli
assert not loaded("torch", "mergekit", "pydantic", "numpy", "transformers")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
