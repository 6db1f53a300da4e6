"""Adam from its paper (Kingma and Ba 2015, Algorithm 1), in NumPy and float64; and SVD by NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file


def adam(
    x: np.ndarray, gradient: Callable[[np.ndarray], np.ndarray], steps: int, rate: float
) -> np.ndarray:
    """The point after some steps."""
    first, second = np.zeros_like(x), np.zeros_like(x)
    for t in range(1, steps + 1):
        g = gradient(x)
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * g**2
        x = x - rate * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    return x


def slope(f: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """The gradient of f by central differences, exact for quadratic functions but for rounding."""
    out = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        moved = np.zeros_like(x)
        moved[index] = step
        out[index] = (f(x + moved) - f(x - moved)) / (2 * step)
    return out


def truncated(a: np.ndarray, k: int) -> np.ndarray:
    """The best approximation of rank k."""
    U, S, Vh = np.linalg.svd(a, full_matrices=False)
    return (U[:, :k] * S[:k]) @ Vh[:k]


def orthonormal(rows: int, columns: int, seed: int) -> np.ndarray:
    """A random matrix with orthonormal columns."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


def vectors(count: int, *shape: int, seed: int = 0, size: float = 0.1) -> list[np.ndarray]:
    """Task vectors in float64, of different sizes."""
    rng = np.random.default_rng(seed)
    return [size * (1 + i) * rng.normal(size=shape) for i in range(count)]


def stacked(d: list[np.ndarray], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Task vectors as the methods take them, [N, ...]."""
    return torch.from_numpy(np.stack(d)).to(dtype)


def run_recipe(
    folder: Path, models: Any, method: str, own: Any = None, **parameters: Any
) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """What mergekit-yaml makes of some tiny models, float32, and the parents, the base first.

    own: parameters of every expert.
    """
    from mergekit_unconstrained import compat

    from mergekit.merge import run_merge  # isort: skip

    recipe = {
        "merge_method": method,
        "base_model": str(models.base),
        "models": [{"model": str(e), "parameters": dict(own or {})} for e in models.experts],
        "parameters": parameters,
        "dtype": "float32",
    }
    config = compat.MergeConfiguration.model_validate(recipe)
    options = compat.MergeOptions(write_model_card=False, copy_tokenizer=False, quiet=True)
    run_merge(config, str(folder), options, config_source=yaml.safe_dump(recipe))
    parents = [load_file(p / "model.safetensors") for p in (models.base, *models.experts)]
    merged = {k: t for f in folder.glob("*.safetensors") for k, t in load_file(f).items()}
    return merged, [{k: t.float() for k, t in p.items()} for p in parents]
