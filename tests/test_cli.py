"""The command line: help without torch, what is printed agrees with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from mergekit_unconstrained import describe
from mergekit_unconstrained.catalog import CATALOG
from mergekit_unconstrained.cli import main
from mergekit_unconstrained.engine.fast import FAST
from tests.conftest import TinyModels

FUSIONS = {"distribution_fusion", "unconstrained"}
ROOT = Path(__file__).resolve().parent.parent


def commands() -> list[list[str]]:
    found: list[list[str]] = [[]]
    for name, command in main.commands.items():
        found.append([name])
        if isinstance(command, click.Group):
            found += [[name, inner] for inner in command.commands]
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_answers_help(command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage:" in result.output
    lines = result.output.split("\n")
    assert len(lines[2].strip()) > 20  # it says what it does


def test_no_explanation_in_the_list_of_commands_is_cut() -> None:
    said = CliRunner().invoke(main, ["--help"], env={"COLUMNS": "80"}).output
    assert "..." not in said.partition("Commands:")[2]


def test_help_imports_neither_torch_nor_mergekit() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\n"
        "from mergekit_unconstrained.cli import main\n"
        f"for command in {commands()!r}:\n"
        "    assert CliRunner().invoke(main, [*command, '--help']).exit_code == 0\n"
        "heavy = {'torch', 'mergekit', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_methods_are_listed_with_paper_parameters_and_bounds() -> None:
    output = " ".join(CliRunner().invoke(main, ["methods"]).output.split())
    for entry in CATALOG.values():
        assert entry.name in output
        assert "arXiv 2410.13699" in output
    assert "0 to 1" in output
    assert "task_arithmetic" in output


@pytest.mark.parametrize(
    ("method", "parameter", "said"),
    [
        ("layerwise", "density", "float, 0 to 1"),
        ("layerwise", "weight", "float"),
        ("wudi", "steps", "int, 0 or more"),
        ("wudi", "learning_rate", "float, above 0 to 1"),
        ("tsvm", "rank_fraction", "float, above 0 to 1"),
        ("consensus", "min_agreement", "int, 0 or more"),
        ("layer_swap", "top", "int, 0 to 1000"),
        ("lines", "alpha", "float, -10 to 10 | auto"),
        ("distribution_fusion", "epochs", "float, above 0"),
    ],
)
def test_bounds_of_every_kind_are_said(method: str, parameter: str, said: str) -> None:
    spec = next(p for p in describe._method(method).spec.parameters if p.name == parameter)
    assert describe.values_of(spec.value_type) == said


def test_methods_of_one_name_says_what_show_says() -> None:
    one, other = (CliRunner().invoke(main, [word, "pcb"]) for word in ("methods", "show"))
    assert one.exit_code == 0
    assert one.output == other.output


@pytest.mark.parametrize("name", ["layerwise", "ties", "linear", "slerp"])
def test_a_method_is_explained(name: str) -> None:
    result = CliRunner().invoke(main, ["show", name])
    assert result.exit_code == 0, result.output
    assert f"merge_method: {name}" in result.output


@pytest.mark.parametrize("name", sorted({*CATALOG, *FAST, "nearswap"} - FUSIONS))
def test_the_shortest_recipe_is_one_that_runs(
    name: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    text = describe.shortest_recipe(name).replace("BASE", str(tiny_models.base))
    for number, expert in enumerate(tiny_models.experts, 1):
        text = text.replace(f"EXPERT_{number}", str(expert))
    (tmp_path / "recipe.yml").write_text(text)
    out = [] if name in CATALOG else [str(tmp_path / "out"), "--quiet"]  # ours say all at once
    arguments = ["yaml" if out else "check", str(tmp_path / "recipe.yml"), *out]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)


@pytest.mark.parametrize("name", sorted(FUSIONS))
def test_a_fusion_is_explained_with_a_recipe_of_its_own(name: str) -> None:
    shown = CliRunner().invoke(main, ["show", name]).output
    assert "arxiv.org/abs/2410.13699" in shown
    assert "mend it here" not in shown  # of the module that mergekit's classes come from
    recipe = yaml.safe_load(describe.shortest_recipe(name))
    assert recipe["parameters"] == {"dataset": "DATA.jsonl", "dry_run": True}
    assert "dtype" not in recipe


def test_an_unknown_method_gets_the_nearest_name() -> None:
    result = CliRunner().invoke(main, ["show", "layerwize"])
    assert result.exit_code == 1
    assert "layerwise" in result.output


def test_the_doctor_tells_versions_and_the_state_of_the_hook() -> None:
    output = CliRunner().invoke(main, ["doctor"]).output
    for word in ("mergekit-unconstrained", "torch", "hook", "extra demo", "device", "cache"):
        assert word in output
    assert re.search(r"hook\s+on", output)


def test_the_readme_holds_the_method_table_of_the_code() -> None:
    assert describe.markdown_table() in (ROOT / "README.md").read_text()


def test_the_readme_names_every_command_and_no_other() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in main.commands:
        assert f"mergekit-unconstrained {name}" in readme
    for name in re.findall(r"`mergekit-unconstrained ([a-z]+)", readme):
        assert name in main.commands
