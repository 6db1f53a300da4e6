"""Real installs: wheel and editable, every front end as a process of its own, hook on and off.

The environments are fresh, but see the packages of this one, ours left out, through a folder of
links: torch need not be downloaded again.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from test_front_ends import LABELS, OURS, FrontEnd, check, content, expected, front_ends, tensors

from mergekit_unconstrained import _activate

__all__ = ["expected"]  # a fixture of test_front_ends, used here too
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SWITCHES: dict[str, dict[str, str]] = {
    "on": {},
    "MERGEKIT_DISABLE_PLUGINS=1": {_activate.OFF_SWITCH: "1"},
    "TORCH_DEVICE_BACKEND_AUTOLOAD=0": {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
}


class Environment(NamedTuple):
    """A virtual environment in a folder."""

    folder: Path

    def run(self, script: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a console script, or python when `script` is its first argument ("-m module")."""
        command = [str(self.folder / "bin" / script)]
        if script == "" or script.startswith("-"):
            command = [str(self.folder / "bin" / "python"), *script.split()]
        hidden = (*SWITCHES["MERGEKIT_DISABLE_PLUGINS=1"], "PYTHONPATH", "VIRTUAL_ENV")
        return subprocess.run(
            [*command, *map(str, arguments)],
            env={k: v for k, v in os.environ.items() if k not in hidden} | env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )

    def pip(self, *arguments: object) -> None:
        """Our pip, working on this environment, which has none."""
        python = self.folder / "bin" / "python"
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, "--python", python, *map(str, arguments)], check=True)

    def files(self) -> set[str]:
        return {str(p.relative_to(self.folder)) for p in self.folder.rglob("*")}


@pytest.fixture(scope="module")
def make_environment(tmp_path_factory) -> Callable[..., Environment]:
    """`make_environment(without=())`: all packages but ours, with mergekit's console scripts."""

    def make(*without: str) -> Environment:
        folder = tmp_path_factory.mktemp("venv")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        links = folder / "links"
        links.mkdir()
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            ours = "mergekit_unconstrained" in path.name
            if not ours and path.suffix != ".pth" and path.name.partition("-")[0] not in without:
                (links / path.name).symlink_to(path)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "links.pth").write_text(f"{links}\n")
        for script in importlib.metadata.distribution("mergekit").entry_points:
            path = folder / "bin" / script.name
            path.write_text(
                f"#!{folder}/bin/python\nimport sys\nfrom {script.module} import {script.attr}\n"
                f"sys.exit({script.attr}())\n"
            )
            path.chmod(0o755)
        return Environment(folder)

    return make


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "-w", folder, ROOT]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


def requirement(kind: str, wheel: Path) -> list[object]:
    return [wheel] if kind == "wheel" else ["-e", ROOT]


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, wheel, make_environment) -> Environment:
    environment = make_environment()
    environment.pip("install", "--no-deps", *requirement(request.param, wheel))
    return environment


API = """
    import sys, yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
    run_merge(config, sys.argv[2], MergeOptions(quiet=True))
    """


def run_all(
    environment: Environment, merge: dict[str, FrontEnd], **env: str
) -> dict[str, subprocess.CompletedProcess[str]]:
    def run(label: str) -> subprocess.CompletedProcess[str]:
        front_end = merge[label]
        arguments = front_end.arguments
        if label == "python":
            arguments = ["-c", textwrap.dedent(API), *arguments]
        return environment.run(front_end.script, *arguments, **env)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(LABELS, pool.map(run, LABELS), strict=True))


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_front_end(installed, tiny_models, tmp_path, expected, switch):
    merge = front_ends(tmp_path, tiny_models.base, list(tiny_models.experts[:2]))
    results = run_all(installed, merge, **SWITCHES[switch])
    for label, result in results.items():
        if switch == "on" or label == OURS:
            assert result.returncode == 0, (label, result.stderr)
            check(merge[label].out, expected)
        else:
            assert result.returncode != 0, label
            assert "RuntimeError: Unimplemented merge method layerwise" in result.stderr, label
            assert not (merge[label].out / "model.safetensors").exists()


def test_a_misspelt_method_ends_in_one_line(installed, tmp_path):
    nobody = Path("nobody/model")
    merge = front_ends(tmp_path, nobody, [nobody, nobody / "b"], "lairwise")["mergekit-yaml"]
    result = installed.run(merge.script, *merge.arguments)
    assert result.returncode == 1
    assert "Did you mean 'layerwise'?" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def stock_merge(environment: Environment, folder: Path, models: list[Path]) -> dict[str, bytes]:
    """Every file that mergekit-multi writes for a linear and a ties merge."""
    recipes = [
        {
            "name": f"stock-{method}",  # mergekit-multi takes a bare `ties` for the merge itself
            "merge_method": method,
            "models": [{"model": str(m), "parameters": {"weight": 0.5}} for m in models[1:]],
            **({"base_model": str(models[0])} if method == "ties" else {}),
        }
        for method in ("linear", "ties")
    ]
    folder.mkdir()
    (folder / "recipes.yml").write_text(yaml.safe_dump_all(recipes))
    result = environment.run("mergekit-multi", folder / "recipes.yml", "-I", folder / "out")
    assert result.returncode == 0, result.stderr
    files = [path for path in (folder / "out").rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): content(path) for path in files}


@pytest.fixture(scope="module")
def without_us(make_environment, tiny_models, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("without-us") / "merge"
    files = stock_merge(make_environment(), folder, [tiny_models.base, *tiny_models.experts[:2]])
    assert {
        f"out/stock-{method}/model.safetensors" for method in ("linear", "ties")
    } <= files.keys()
    return files


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_stock_merges_keep_every_byte_and_uninstalling_leaves_nothing(
    kind, wheel, make_environment, without_us, tiny_models, tmp_path
):
    models = [tiny_models.base, *tiny_models.experts[:2]]
    environment = make_environment()
    before = environment.files()
    environment.pip("install", "--no-deps", *requirement(kind, wheel))
    assert stock_merge(environment, tmp_path / "installed", models) == without_us
    environment.pip("uninstall", "--yes", "mergekit-unconstrained")
    assert environment.files() == before
    assert stock_merge(environment, tmp_path / "uninstalled", models) == without_us


def test_torch_imports_in_silence_where_mergekit_is_missing(wheel, make_environment):
    environment = make_environment("mergekit")
    environment.pip("install", "--no-deps", wheel)
    result = environment.run("-W error -c", "import torch; import mergekit_unconstrained")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert "No module named 'mergekit'" in environment.run("-c", "import mergekit").stderr


PLUGIN: dict[str, str] = {
    "pyproject.toml": """
        [build-system]
        requires = ["hatchling"]
        build-backend = "hatchling.build"

        [project]
        name = "mergekit-halfway"
        version = "0.1"
        dependencies = ["mergekit"]

        [project.entry-points."mergekit.merge_methods"]
        halfway = "mergekit_halfway:halfway"
        """,
    "mergekit_halfway.py": """
        import torch
        from mergekit.merge_methods import TensorGroup, merge_method

        @merge_method(name="halfway")
        def halfway(group: TensorGroup, t: float = 0.5) -> torch.Tensor:
            first, second = group.tensors
            return first.lerp(second, t)
        """,
}


def test_the_plugin_of_somebody_else_runs_from_mergekit_yaml(installed, tiny_models, tmp_path):
    for name, text in PLUGIN.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    installed.pip("install", "--no-deps", tmp_path)
    first, second = tiny_models.experts[:2]
    recipe: dict[str, Any] = {
        "merge_method": "halfway",
        "models": [{"model": str(first)}, {"model": str(second)}],
        "parameters": {"t": 0.25},
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    result = installed.run("mergekit-yaml", tmp_path / "recipe.yml", tmp_path / "out", "--quiet")
    assert result.returncode == 0, result.stderr
    one, other, merged = (tensors(folder) for folder in (first, second, tmp_path / "out"))
    for name, tensor in merged.items():
        exact = 0.75 * one[name].double() + 0.25 * other[name].double()
        assert (tensor.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    installed.pip("uninstall", "--yes", "mergekit-halfway")
