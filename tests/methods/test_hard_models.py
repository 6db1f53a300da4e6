"""Methods that look at the whole model first, on models that are hard to look at."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from whole_models import Tensors, merged, read

Parameters = Mapping[str, Any]

CASES: dict[str, tuple[str, Parameters]] = {
    "ties_global": ("ties_global", {}),
    "pcb language": ("pcb", {"scope": "model"}),
    "pcb vision": ("pcb", {"scope": "model", "variant": "vision"}),
    "doge": ("doge", {"steps": 2}),
    "opcm": ("opcm", {}),
    "lines": ("lines", {"weight": [0.4, 0.8]}),
}
every_case = pytest.mark.parametrize(("method", "parameters"), CASES.values(), ids=list(CASES))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEKIT_UNCONSTRAINED_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def at(make_tiny: Any, tmp_path: Path) -> Callable[[str, int, float], Path]:
    """at(name, i, scale): expert i with its distance from the base scaled; i of 0 is the base."""
    tiny = make_tiny("llama", experts=2, num_hidden_layers=2)
    models = [tiny.base, *tiny.experts]

    def write(name: str, i: int, scale: float) -> Path:
        folder = tmp_path / name
        shutil.copytree(models[i], folder)
        base, expert = (load_file(m / "model.safetensors") for m in (models[0], models[i]))
        tensors = {k: t.float() + scale * (expert[k].float() - t.float()) for k, t in base.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


def moved(found: Tensors, base: Path) -> np.ndarray:
    """How far every entry of a model is from the base, as one vector."""
    start = read(base)
    return np.concatenate([(found[k] - start[k]).ravel() for k in sorted(start)])


@every_case
def test_experts_that_are_the_base_give_the_base(
    method: str, parameters: Parameters, at: Any, tmp_path: Path
) -> None:
    models = [at(name, 0, 1.0) for name in ("base", "one", "other")]
    assert not moved(merged(tmp_path, method, models, parameters), models[0]).any()


@every_case
def test_equal_experts_move_the_base_their_way(
    method: str, parameters: Parameters, at: Any, tmp_path: Path
) -> None:
    models = [at("base", 0, 1.0), at("one", 1, 1.0), at("other", 1, 1.0)]
    d = moved(read(models[1]), models[0])
    found = moved(merged(tmp_path, method, models, parameters), models[0])
    assert np.isfinite(found).all()
    assert d @ found > 0


@every_case
def test_one_expert_alone_moves_the_base_its_way(
    method: str, parameters: Parameters, at: Any, tmp_path: Path
) -> None:
    if method == "lines":
        parameters = {"weight": 0.4}
    models = [at("base", 0, 1.0), at("one", 1, 1.0)]
    d = moved(read(models[1]), models[0])
    assert d @ moved(merged(tmp_path, method, models, parameters), models[0]) > 0


@every_case
@pytest.mark.parametrize("scales", [(1e-5, 1e4), (1e4, 0.0)], ids=str)
def test_experts_of_wildly_different_scales_give_a_finite_model(
    method: str, parameters: Parameters, scales: tuple[float, float], at: Any, tmp_path: Path
) -> None:
    models = [at("base", 0, 1.0), at("one", 1, scales[0]), at("other", 2, scales[1])]
    found = moved(merged(tmp_path, method, models, parameters), models[0])
    assert np.isfinite(found).all()
    assert found.any()


@pytest.mark.parametrize(
    ("method", "name"), [("ties_global", "density"), ("pcb", "density"), ("doge", "top")]
)
def test_none_and_all_of_the_entries_of_a_model(
    method: str, name: str, at: Any, tmp_path: Path
) -> None:
    models = [at("base", 0, 1.0), at("one", 1, 1.0), at("other", 2, 1.0)]
    own = {"steps": 2} if method == "doge" else {}
    found = {}
    for fraction in (0.0, 1.0):
        folder = tmp_path / str(fraction)
        folder.mkdir()
        parameters = {**own, name: fraction, "scope": "model"}
        found[fraction] = moved(merged(folder, method, models, parameters), models[0])
    assert not found[0.0].any()
    assert np.isfinite(found[1.0]).all()
    matrices = sum(
        t.numel()
        for k, t in load_file(models[0] / "model.safetensors").items()
        if method != "doge" or (t.ndim == 2 and "layers" in k)
    )
    assert np.count_nonzero(found[1.0]) > 0.9 * matrices
