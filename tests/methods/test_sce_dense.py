"""`sce_dense` against the steps of the paper on plain lists, in exact fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from mergekit.merge_methods import merge_tensors  # isort: skip


def sce(tensors: list[torch.Tensor], **parameters: float) -> list[float]:
    merged = merge_tensors(tensors, "sce_dense", base_index=0, name="w", parameters=parameters)
    return merged.double().flatten().tolist()


def tensors(count: int, seed: int = 0) -> list[torch.Tensor]:
    """A base of zeros and task vectors whose variances differ from entry to entry."""
    generator = torch.Generator().manual_seed(seed)
    experts = [torch.randint(-999, 1000, (5, 8), generator=generator) / 64 for _ in range(count)]
    return [torch.zeros(5, 8), *experts]


def published(given: list[torch.Tensor], select_topk: float) -> list[float]:
    d = [[Fraction(x) for x in t.flatten().tolist()] for t in given[1:]]
    n, entries = len(d), list(zip(*d, strict=True))
    variance = [sum((x - sum(xs) / n) ** 2 for x in xs) / n for xs in entries]
    count = int(sum(v != 0 for v in variance) * select_topk)
    order = sorted(range(len(entries)), key=lambda j: (-variance[j], j))
    selected = range(len(entries)) if select_topk == 1 else order[:count]
    energy = [sum(one[j] ** 2 for j in selected) for one in d]
    total = sum(energy)
    eta = [e / total if total else Fraction(1, n) for e in energy]
    merged = []
    for xs in entries:
        sign = 1 if sum(xs) >= 0 else -1
        agreeing = [(e, x) for e, x in zip(eta, xs, strict=True) if x * sign > 0]
        weight = sum(e for e, _ in agreeing)
        merged.append(float(sum(e * x for e, x in agreeing) / weight) if weight else 0.0)
    return merged


@pytest.mark.parametrize("select_topk", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_steps_of_the_paper(count: int, select_topk: float) -> None:
    given = tensors(count)
    expected = published(given, select_topk)
    assert sce(given, select_topk=select_topk) == pytest.approx(expected, rel=2e-6, abs=1e-6)


def test_the_default_is_fusechats_tenth() -> None:
    given = tensors(3)
    assert sce(given) == sce(given, select_topk=0.1) != sce(given, select_topk=0.2)


def test_every_entry_is_merged_where_mergekit_merges_the_selected_ones() -> None:
    given = tensors(2)
    theirs = merge_tensors(given, "sce", base_index=0, parameters={"select_topk": 0.1})
    assert sum(x != 0 for x in theirs.flatten().tolist()) <= 4
    assert sum(x != 0 for x in sce(given)) > 35


def test_lambda_scales() -> None:
    given = tensors(2)
    assert sce(given, **{"lambda": 0.5}) == pytest.approx([x / 2 for x in sce(given)], rel=1e-6)
