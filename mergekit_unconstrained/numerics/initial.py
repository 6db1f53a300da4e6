"""Starting coefficients from the weights alone, without any data.

Notation: d_i = T_i - T0 the task vectors, N experts, l a layer, L their number.

    uniform   w_i = 1 / N                                                                   (1)
    energy    w_i = mean(d_i^2) / sum_j mean(d_j^2), uniform where every d_i is zero        (2)
    depth     w_i = alpha + beta * l / (L - 1); alpha outside the layers                    (3)

(2) is VaRM of FuseChat (Wan et al. 2024, arXiv 2402.16107), which weighs every parameter matrix by
its mean squared change. (3) is LiNeS (Wang et al. 2024, arXiv 2410.17146), the authors' code
`LiNeS_scaling`. For several experts they set alpha = (||sum_i d_i||_1 / ||D||_1) / N; with task
arithmetic D = sum_i d_i, so alpha = 1 / N exactly, whatever the weights. They search beta for
several experts (0.1 to 1) and set beta = 1 - alpha for one; taking the latter as the default for
several, so that the last layer adds the task vectors whole, is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

CHUNK = 1 << 17
"""Entries squared at a time: 1 MiB in float64, which stays in a core's cache."""


def uniform(experts: int) -> float:
    """Eq. (1)."""
    return 1 / experts


def energy(squares: Sequence[float]) -> list[float]:
    """Eq. (2) from sum(d_i^2) of every expert; the sums run over the same entries."""
    total = sum(squares)
    if total == 0:
        return [uniform(len(squares))] * len(squares)
    return [square / total for square in squares]


def depth(layer: int | None, layers: int, alpha: float, beta: float) -> float:
    """Eq. (3). A model of one layer has only the first, which takes alpha."""
    if layer is None or layers < 2:
        return alpha
    return alpha + beta * layer / (layers - 1)


def squared_change(expert: torch.Tensor, base: torch.Tensor) -> float:
    """sum(d_i^2), in float64 throughout.

    expert, base: any equal shape and float dtype. Only CHUNK entries are widened at a time.
    """
    total = torch.zeros((), dtype=torch.float64, device=base.device)
    ti, t0 = expert.reshape(-1), base.reshape(-1)
    for start in range(0, t0.numel(), CHUNK):
        piece = slice(start, start + CHUNK)
        d = ti[piece].double().sub_(t0[piece].double())
        total += torch.dot(d, d)
    return float(total)
