"""Small models on disk, merged by whole recipes, and read back in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.torch import load_file

from mergekit_unconstrained import compat, jobs

Tensors = dict[str, np.ndarray]


def read(folder: Path) -> Tensors:
    """All tensors of a model."""
    return {
        name: t.double().numpy()
        for shard in sorted(folder.glob("*.safetensors"))
        for name, t in load_file(shard).items()
    }


def merged(
    folder: Path,
    method: str,
    models: Sequence[Path],
    parameters: Mapping[str, Any],
    each: Sequence[Mapping[str, Any]] = (),
) -> Tensors:
    """What a recipe in float32 writes. models: base and experts; each: parameters of an expert."""
    base, *experts = models
    own = each or [{}] * len(experts)
    data = {
        "merge_method": method,
        "base_model": str(base),
        "models": [
            {"model": str(e), "parameters": dict(p)} for e, p in zip(experts, own, strict=True)
        ],
        "parameters": dict(parameters),
        "dtype": "float32",
    }
    recipe = folder / f"{method}.yml"
    recipe.write_text(yaml.safe_dump(data))
    options = compat.MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    jobs.run_recipe(str(recipe), str(folder / f"{method}-out"), options)
    return read(folder / f"{method}-out")


def deltas(models: Sequence[Path]) -> tuple[Tensors, list[Tensors]]:
    """T0 and the d_i of every expert."""
    base, *experts = [read(m) for m in models]
    return base, [{k: e[k] - t for k, t in base.items()} for e in experts]


def assert_close(found: Tensors, expected: Mapping[str, np.ndarray], atol: float = 2e-7) -> None:
    """Every tensor, to the rounding of weights around 1 in float32."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=2e-7, atol=atol, err_msg=name)
