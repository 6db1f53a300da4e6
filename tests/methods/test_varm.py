"""`varm` against sums over plain lists, at both granularities."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from mergekit.merge_methods import merge_tensors  # isort: skip


def varm(tensors: list[torch.Tensor], granularity: str, **parameters: float) -> list[float]:
    parameters = {"granularity": granularity, **parameters}
    merged = merge_tensors(tensors, "varm", base_index=0, name="w", parameters=parameters)
    return merged.double().flatten().tolist()


def tensors(count: int, scale: float = 1.0) -> list[torch.Tensor]:
    """A base of zeros, so that the result is D, and experts of eighths."""
    generator = torch.Generator().manual_seed(count)
    size = (6, 7)
    experts = [torch.randint(-9, 10, size, generator=generator) * scale / 8 for _ in range(count)]
    return [torch.zeros(size), *(e * (i + 1) for i, e in enumerate(experts))]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_tensors_shares_are_those_of_its_mean_squares(count: int) -> None:
    given = tensors(count)
    d = [[Fraction(x) for x in t.flatten().tolist()] for t in given[1:]]
    squares = [sum(x * x for x in one) for one in d]
    expected = [
        float(sum(s * x for s, x in zip(squares, xs, strict=True)) / sum(squares))
        for xs in zip(*d, strict=True)
    ]
    assert varm(given, "tensor") == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert varm(given, "tensor", **{"lambda": -2.0}) == pytest.approx(
        [-2 * x for x in expected], rel=1e-6, abs=1e-7
    )


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_entrys_shares_are_those_of_its_own_squares(count: int) -> None:
    given = tensors(count)
    expected = []
    for entries in zip(*(t.flatten().tolist() for t in given[1:]), strict=True):
        xs = [Fraction(x) for x in entries]
        total = sum(x * x for x in xs)
        expected.append(float(sum(x**3 for x in xs) / total) if total else 0.0)
    assert varm(given, "element") == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_squares_that_leave_the_range_of_float32_do_no_harm() -> None:
    plain = varm(tensors(3), "element")
    small = varm(tensors(3, scale=2.0**-80), "element")
    assert [x * 2.0**80 for x in small] == pytest.approx(plain, rel=1e-6)
    large = varm(tensors(3, scale=2.0**80), "element")
    assert [x * 2.0**-80 for x in large] == pytest.approx(plain, rel=1e-6)


def test_an_expert_alone_is_taken_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)]
    for granularity in ("tensor", "element"):
        expected = given[1].double().flatten().tolist()
        assert varm(given, granularity) == pytest.approx(expected, abs=1e-6)
