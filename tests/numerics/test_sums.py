"""Sums in float64 against Python's exact ones."""

from __future__ import annotations

import math

import pytest
import torch

from mergekit_unconstrained.numerics import sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0,), (1,), (7, 30), (30, 7)], ids=str)
def test_products_are_summed_in_float64(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "PIECE", 50)
    generator = torch.Generator().manual_seed(0)
    a, b = (1e3 * torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    x, y = ([float(v) for v in t.reshape(-1)] for t in (a, b))
    exact = math.fsum(p * q for p, q in zip(x, y, strict=True))
    assert sums.dot(a, b) == pytest.approx(exact, rel=1e-11, abs=1e-6)
    assert sums.dot(a.movedim(0, -1), b.movedim(0, -1)) == pytest.approx(exact, rel=1e-11, abs=1e-6)
    assert sums.norm(a) == pytest.approx(math.sqrt(math.fsum(p * p for p in x)), rel=1e-13)
