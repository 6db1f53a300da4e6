"""`widen` against its definition, column by column in plain Python."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from adam_reference import stacked, vectors

from mergekit_unconstrained.methods.widen import flat_vector, matrix_vector, ranks

from mergekit.merge_methods import merge_tensors  # isort: skip

widen_module = importlib.import_module("mergekit_unconstrained.methods.widen")
UP = "model.layers.0.mlp.up_proj.weight"


def length(column: list[float]) -> float:
    return math.sqrt(math.fsum(x * x for x in column))


def cosine(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (length(a) * length(b))


def rank_of(values: list[float]) -> list[float]:
    """The number of columns before each, equal ones by position, as a fraction."""
    return [
        sum(v < x or (v == x and j < i) for j, v in enumerate(values)) / len(values)
        for i, x in enumerate(values)
    ]


def importances(x: list[list[float]], threshold: float, calibration: float) -> list[list[float]]:
    """p of every expert and column."""
    out = []
    for row in x:
        mean = math.fsum(row) / len(row) + 1e-15  # nothing lies that close above a mean
        scores = []
        for c, value in enumerate(row):
            softmax = math.exp(value) / sum(math.exp(other[c]) for other in x)
            scores.append(calibration if value > threshold * mean else softmax)
        out.append(scores)
    return out


def reference(
    t0: np.ndarray, d: list[np.ndarray], weights: list[float], threshold: float, calibration: float
) -> np.ndarray:
    """D of a matrix, out x in."""
    columns = range(t0.shape[1])
    M, C = [], []
    for d_i in d:
        t = t0 + d_i
        pairs = [(t[:, c].tolist(), t0[:, c].tolist()) for c in columns]
        M.append([abs(length(a) - length(b)) for a, b in pairs])
        C.append([0.0 if a == b else 1 - cosine(a, b) for a, b in pairs])
    p = [importances([rank_of(row) for row in x], threshold, calibration) for x in (M, C)]
    out = np.zeros_like(t0)
    for i, d_i in enumerate(d):
        for c in columns:
            out[:, c] += weights[i] * (p[0][i][c] + p[1][i][c]) / 2 * d_i[:, c]
    return out


def weights_of(count: int) -> list[float]:
    return [1.0, 0.5, -2.0, 1.5, 0.1][:count]


@pytest.mark.parametrize(("threshold", "calibration"), [(1.0, 1.0), (0.5, 2.0), (0, 1), (9, 1)])
@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (1, 4)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_it_is_the_definition(
    count: int, shape: tuple[int, int], threshold: float, calibration: float
) -> None:
    t0, *d = vectors(count + 1, *shape)
    found = matrix_vector(
        torch.from_numpy(t0),
        stacked(d),
        torch.tensor(weights_of(count), dtype=torch.float64),
        threshold,
        calibration,
    )
    expected = reference(t0, d, weights_of(count), threshold, calibration)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_vector_is_scored_by_its_entries(count: int) -> None:
    d = vectors(count, 13)
    found = flat_vector(stacked(d), torch.tensor(weights_of(count), dtype=torch.float64), 1.2, 3.0)
    p = importances([np.abs(d_i).tolist() for d_i in d], 1.2, 3.0)
    expected = sum(
        w * np.array(p_i) * d_i for w, p_i, d_i in zip(weights_of(count), p, d, strict=True)
    )
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-14)


def test_a_case_by_hand() -> None:
    """Base 1 in the first row of two columns; expert one lengthens one, expert two turns both."""
    t0 = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    d = torch.tensor([[[0.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [2.0, 1.0]]])
    # M: (0, 1) and (sqrt 5 - 1, sqrt 2 - 1): ranks (0, .5) and (.5, 0), mean .25.
    # C: (0, 0), a tie, and (1 - 1 / sqrt 5, 1 - 1 / sqrt 2): ranks (0, .5) and (.5, 0).
    small = 1 / (1 + math.exp(0.5))  # softmax of 0 beside 0.5
    expected = torch.tensor([[0.0, 1.0], [2.0, small]])
    found = matrix_vector(t0, d, torch.ones(2), 1.0, 1.0)
    torch.testing.assert_close(found, expected)


def test_equal_columns_are_ranked_in_their_order() -> None:
    x = torch.tensor([[2.0, 1.0, 1.0, 0.0, 2.0]]).double()
    torch.testing.assert_close(ranks(x), torch.tensor([[3, 1, 2, 0, 4]]).double())


def test_columns_that_nobody_turned_count_as_equal() -> None:
    """Rounding must not rank what one expert left alone, where the other is weighed beside it."""
    t0, *d = vectors(3, 7, 40)
    d[0][:, 20:] = 0
    found = matrix_vector(torch.from_numpy(t0), stacked(d), torch.ones(2).double(), 1.0, 5.0)
    expected = reference(t0, d, [1.0, 1.0], 1.0, 5.0)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-13)


def test_a_column_of_zeros_has_no_direction() -> None:
    t0 = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    d = torch.tensor([[[1.0, 0.5], [1.0, -0.5]], [[0.0, 0.1], [0.0, 0.1]]])
    found = matrix_vector(t0, d, torch.ones(2), 1.0, 1.0)
    assert bool(found.isfinite().all())


def merge(tensors: torch.Tensor, name: str = UP, **parameters: Any) -> torch.Tensor:
    return merge_tensors([*tensors], "widen", base_index=0, name=name, parameters=parameters)


def test_an_embedding_is_read_some_tokens_after_others(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = stacked(vectors(3, 40, 6), torch.float32)
    name = "model.embed_tokens.weight"
    expected = merge(tensors, name)
    monkeypatch.setattr(widen_module, "CHUNK", 20)  # 3 tokens, or 20 numbers of one
    torch.testing.assert_close(merge(tensors, name), expected, rtol=0, atol=0)
    monkeypatch.setattr(widen_module, "CHUNK", 4)
    torch.testing.assert_close(merge(tensors, name), expected, rtol=0, atol=0)


def test_the_columns_of_an_embedding_are_its_tokens_and_the_head_is_not_turned() -> None:
    tensors = stacked(vectors(3, 10, 6), torch.float32)
    turned = merge(tensors.mT.contiguous()).T
    torch.testing.assert_close(merge(tensors, "model.embed_tokens.weight"), turned)
    torch.testing.assert_close(merge(tensors, "lm_head.weight"), merge(tensors))
    assert not torch.allclose(turned, merge(tensors))


def test_a_merge_measures_columns_from_the_base() -> None:
    t0, *d = vectors(3, 10, 6)
    tensors = torch.stack([torch.from_numpy(t) for t in (t0, t0 + d[0], t0 + d[1])])
    found = merge(tensors).numpy() - t0
    expected = reference(t0, [t.numpy() - t0 for t in tensors[1:]], [1.0, 1.0], 1.0, 1.0)
    np.testing.assert_allclose(found, expected, atol=1e-13)


def test_weight_and_lambda_scale_what_is_added() -> None:
    base, *d = stacked(vectors(3, 10, 6), torch.float32)
    tensors = torch.stack([base, *(base + d_i for d_i in d)])
    plain = merge(tensors) - base
    scaled = merge(tensors, weight=2.0, **{"lambda": 0.25}) - base
    torch.testing.assert_close(scaled, plain / 2)


def test_more_dimensions_are_read_as_a_matrix() -> None:
    tensors = stacked(vectors(3, 4, 3, 2), torch.float32)
    torch.testing.assert_close(merge(tensors), merge(tensors.flatten(2)).view(4, 3, 2))
