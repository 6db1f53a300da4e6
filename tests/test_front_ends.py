"""One merge through every front end of mergekit: with the hook, without it, and stock methods."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import yaml
from click.testing import CliRunner

from mergekit_unconstrained import _activate

WEIGHTS = (0.5, 0.3)
OURS = "mergekit-unconstrained yaml"


class FrontEnd(NamedTuple):
    """How a merge is started: `script` is a console script, or a module after `python -m`."""

    script: str
    module: str
    arguments: list[str]
    out: Path


def front_ends(
    folder: Path, base: Path, experts: list[Path], method: str = "layerwise"
) -> dict[str, FrontEnd]:
    """The same merge of two experts for every front end; recipes and outputs lie in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)

    def recipe(name: str, *documents: dict[str, Any]) -> str:
        (folder / name).write_text(yaml.safe_dump_all(documents))
        return str(folder / name)

    def merge(base: Path, models: dict[str, float]) -> dict[str, Any]:
        inputs = [{"model": m, "parameters": {"weight": w}} for m, w in models.items()]
        return {"merge_method": method, "base_model": str(base), "models": inputs}

    models = dict(zip(map(str, experts), WEIGHTS, strict=True))
    files = {f"{model}/model.safetensors": weight for model, weight in models.items()}
    plain = recipe("plain.yml", merge(base, models))
    several = recipe(
        "several.yml",
        {"name": "first", **merge(base, models)},
        merge(base, {"first": 1.0}),
    )
    raw = recipe("raw.yml", merge(base / "model.safetensors", files))
    legacy = ["--method", method, "--base-model", str(base), "--no-normalize"]
    for model, weight in models.items():
        legacy += ["--merge", model, "--weight", str(weight)]
    scripts = "mergekit.scripts"

    def out(name: str) -> Path:
        return folder / f"out-{name}"

    return {
        "mergekit-yaml": FrontEnd(
            "mergekit-yaml",
            f"{scripts}.run_yaml",
            [plain, str(out("yaml")), "--quiet"],
            out("yaml"),
        ),
        "mergekit-multi": FrontEnd(
            "mergekit-multi",
            f"{scripts}.multimerge",
            [several, "--out-path", str(out("multi")), "-I", str(folder / "between"), "--quiet"],
            out("multi"),
        ),
        "mergekit-legacy": FrontEnd(
            "mergekit-legacy",
            f"{scripts}.legacy",
            [str(out("legacy")), *legacy, "--quiet"],
            out("legacy"),
        ),
        "mergekit-pytorch": FrontEnd(
            "mergekit-pytorch", f"{scripts}.merge_raw_pytorch", [raw, str(out("raw"))], out("raw")
        ),
        "python -m": FrontEnd(
            f"-m {scripts}.run_yaml",
            f"{scripts}.run_yaml",
            [plain, str(out("m")), "--quiet"],
            out("m"),
        ),
        "python": FrontEnd("", "", [plain, str(out("python"))], out("python")),
        OURS: FrontEnd(
            "mergekit-unconstrained",
            "mergekit_unconstrained.cli",
            ["yaml", plain, str(out("ours")), "--quiet"],
            out("ours"),
        ),
    }


def start(label: str, front_end: FrontEnd) -> str:
    """Run a front end in this process: "" when it succeeds, else its error."""
    if label == "python":
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        config = yaml.safe_load(Path(front_end.arguments[0]).read_text())
        try:
            run_merge(
                MergeConfiguration.model_validate(config),
                str(front_end.out),
                MergeOptions(quiet=True),
            )
        except RuntimeError as error:
            return str(error)
        return ""
    if label == "python -m":
        sys.modules.pop(front_end.module, None)  # runpy warns of a module that is already there
        argv = [front_end.module, *front_end.arguments]
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            try:
                with mock.patch.object(sys, "argv", argv):
                    runpy.run_module(front_end.module, run_name="__main__", alter_sys=True)
            except SystemExit as stop:
                return printed.getvalue() if stop.code else ""
            except RuntimeError as error:
                return str(error)
        return ""
    result = CliRunner().invoke(importlib.import_module(front_end.module).main, front_end.arguments)
    if result.exit_code == 0:
        return ""
    return result.output if isinstance(result.exception, SystemExit) else str(result.exception)


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def content(path: Path) -> bytes:
    """A file's bytes; of a card its sorted lines, since mergekit lists models in a set's order."""
    data = path.read_bytes()
    return b"\n".join(sorted(data.splitlines())) if path.name == "README.md" else data


@pytest.fixture(scope="module")
def expected(tiny_models) -> dict[str, Any]:
    """Base plus weighted differences, in float64 and by nobody's code but this line's."""
    base = {name: t.double() for name, t in tensors(tiny_models.base).items()}
    parts = [(w, tensors(e)) for w, e in zip(WEIGHTS, tiny_models.experts, strict=False)]
    return {name: t + sum(w * (e[name].double() - t) for w, e in parts) for name, t in base.items()}


@pytest.fixture(scope="module")
def merges(tiny_models, tmp_path_factory) -> dict[str, FrontEnd]:
    folder = tmp_path_factory.mktemp("front-ends")
    return front_ends(folder, tiny_models.base, list(tiny_models.experts[:2]))


def check(folder: Path, expected: dict[str, Any]) -> None:
    import torch

    found = tensors(folder)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), expected[name], rtol=2**-8, atol=1e-6)


LABELS = [
    "mergekit-yaml",
    "mergekit-multi",
    "mergekit-legacy",
    "mergekit-pytorch",
    "python -m",
    "python",
    OURS,
]


@pytest.mark.parametrize("label", LABELS)
def test_layerwise_runs_from(label, merges, expected):
    assert start(label, merges[label]) == ""
    check(merges[label].out, expected)
    if label != "mergekit-pytorch":  # which knows weights only
        assert (merges[label].out / "config.json").exists()
        assert (merges[label].out / "tokenizer.json").exists()


def test_layerwise_runs_under_its_alias(tiny_models, tmp_path, expected):
    merge = front_ends(tmp_path, tiny_models.base, list(tiny_models.experts[:2]), "mku_layerwise")
    assert start("mergekit-yaml", merge["mergekit-yaml"]) == ""
    check(merge["mergekit-yaml"].out, expected)


def test_legacy_divides_by_the_weights_unless_told_not_to(tiny_models, tmp_path, expected):
    merge = front_ends(tmp_path, tiny_models.base, list(tiny_models.experts[:2]))
    legacy = merge["mergekit-legacy"]
    legacy.arguments.remove("--no-normalize")
    assert start("mergekit-legacy", legacy) == ""
    base = {name: tensor.double() for name, tensor in tensors(tiny_models.base).items()}
    check(legacy.out, {n: base[n] + (t - base[n]) / sum(WEIGHTS) for n, t in expected.items()})


def test_layerwise_merges_tensors_and_state_dicts_in_memory(tiny_models, expected):
    import torch
    from mergekit.merge_methods import merge_state_dicts, merge_tensors

    models = {
        "base": tensors(tiny_models.base),
        **{f"expert{i}": tensors(e) for i, e in enumerate(tiny_models.experts[:2])},
    }
    merged = merge_state_dicts(
        models,
        "layerwise",
        base="base",
        parameters={"weight": dict(zip(("expert0", "expert1"), WEIGHTS, strict=True))},
    )
    name = "model.layers.2.mlp.up_proj.weight"
    one = merge_tensors(
        [model[name] for model in models.values()],
        "layerwise",
        base_index=0,
        name=name,
        parameters={"weight": list(WEIGHTS)},
    )
    assert merged.keys() == expected.keys()
    torch.testing.assert_close(merged[name].double(), expected[name], rtol=2**-8, atol=1e-6)
    assert torch.equal(one, merged[name])


@pytest.mark.parametrize("label", LABELS)
def test_a_misspelt_method_is_refused_with_the_right_word_by(label, tmp_path):
    merge = front_ends(
        tmp_path, Path("nobody/base"), [Path("nobody/a"), Path("nobody/b")], "lairwise"
    )
    assert "Did you mean 'layerwise'?" in start(label, merge[label])
    assert not merge[label].out.exists()


def with_the_hook_off(folder: Path, base: Path, experts: list[Path]) -> dict[str, dict[str, str]]:
    """What every front end says; runs in a process of its own."""
    merge = front_ends(folder, base, experts)
    stock = front_ends(folder / "stock", base, experts, "ties")["mergekit-yaml"]
    labels = [label for label in LABELS if label != OURS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answers = {
            "stock": {"mergekit-yaml": start("mergekit-yaml", stock)},
            "off": {label: start(label, merge[label]) for label in labels},
            # Our own command needs no hook; and it comes late, when all of mergekit is loaded.
            "ours": {OURS: start(OURS, merge[OURS])},
        }
        answers["late"] = {label: start(label, merge[label]) for label in labels}
    return answers


def test_with_the_hook_off_mergekit_is_stock_and_our_own_command_works(
    tiny_models, tmp_path, expected
):
    experts = list(tiny_models.experts[:2])
    code = (
        "import json, pathlib, sys; P = pathlib.Path; from test_front_ends import *;"
        "answers = with_the_hook_off(P(sys.argv[1]), P(sys.argv[2]), [*map(P, sys.argv[3:])]);"
        "print(json.dumps(answers))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path, tiny_models.base, *experts],
        env=os.environ | {_activate.OFF_SWITCH: "1", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout.splitlines()[-1])
    merge = front_ends(tmp_path, tiny_models.base, experts)
    for label, answer in answers.pop("off").items():
        assert answer == "Unimplemented merge method layerwise", label
    for answer in answers.values():
        assert set(answer.values()) == {""}
    for front_end in merge.values():
        check(front_end.out, expected)

    # The hook changes no byte of what mergekit's own methods write.
    ours = front_ends(tmp_path / "hooked", tiny_models.base, experts, "ties")["mergekit-yaml"]
    assert start("mergekit-yaml", ours) == ""
    theirs = tmp_path / "stock" / "out-yaml"
    assert sorted(p.name for p in theirs.iterdir()) == sorted(p.name for p in ours.out.iterdir())
    for path in theirs.iterdir():
        assert content(path) == content(ours.out / path.name), path.name
