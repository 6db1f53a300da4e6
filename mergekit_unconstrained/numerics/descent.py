"""Adam on a task vector, with a look at whether the loss falls.

The methods that descend are defined by where they start, their learning rate and the number of
their steps, not by the optimum: Adam moves every entry by about the learning rate a step, whatever
the size of the loss. State and steps are float32, or float64 for float64 starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_unconstrained.numerics.sums import dot

log = logging.getLogger(__name__)

ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}
"""A gradient below this fraction of the terms it is the difference of is nothing but rounding."""
FALLEN = 1e-6
"""A loss must fall by this fraction to have fallen."""


@dataclass(frozen=True)
class Quadratic:
    """f(m) = sum_i norm_F((m - h_i) L_i')^2, from its Gram matrices.

    G = sum_i L_i' L_i, [n, n]; R = sum_i h_i L_i' L_i, [m, n]; constant = sum_i norm_F(h_i L_i')^2.
    """

    G: torch.Tensor
    R: torch.Tensor
    constant: float

    def __call__(self, m: torch.Tensor) -> tuple[float, torch.Tensor]:
        """f and its gradient 2 (m G - R), for one matrix product."""
        slope = m @ self.G
        slope.sub_(self.R)  # half of it
        inner = dot(m, slope) - dot(m, self.R)
        return inner + self.constant, slope.mul_(2)

    def at_optimum(self, m: torch.Tensor) -> bool:
        """Whether the gradient is zero but for rounding, which Adam would blow up."""
        slope = _largest(self(m)[1])
        return slope <= ROUNDING[m.dtype] * _largest(self.R)

    def nearest_minimiser(self, m: torch.Tensor) -> torch.Tensor:
        """The minimiser of f nearest to m: m + (R - m G) G^+; everything float64.

        Directions in which G is below 1e-10 of its largest eigenvalue are left as they are in m.
        """
        values, Q = torch.linalg.eigh(self.G)
        kept = values > 1e-10 * values[-1].clamp(min=torch.finfo(values.dtype).tiny)
        Q = Q[:, kept]
        return m + ((self.R - m @ self.G) @ Q) / values[kept] @ Q.T


def adam(
    start: torch.Tensor,
    objective: Callable[[torch.Tensor], tuple[float, torch.Tensor]],
    steps: int,
    learning_rate: float,
    *,
    name: str = "",
    on_step: Callable[[], Any] = lambda: None,
) -> torch.Tensor:
    """`steps` steps of Adam (betas 0.9 and 0.999, epsilon 1e-8, no decay) from a start.

    start: it becomes the result, so that there are four matrices of its shape and no more: x, its
    gradient, and the two means of Adam.
    objective: loss and gradient at a point. name: of the tensor, for the warning that comes after a
    tenth of the steps when the loss has not fallen by then.
    """
    x = start.detach()
    optimizer = torch.optim.Adam([x], lr=learning_rate, fused=True)  # one pass, not some ten
    first = None
    for step in range(steps):
        x.grad = None  # its memory is the next one's
        loss, x.grad = objective(x)
        if first is None:
            first = loss
            if not bool(x.grad.any()):
                break  # Adam stays where there is no slope
        elif step == max(1, steps // 10) and loss > (1 - FALLEN) * first:
            rose = loss > (1 + FALLEN) * first
            log.warning(
                "%s: the loss has not fallen, from %.6g to %.6g after %d steps: choose a "
                "learning_rate %s %g",
                name or "an unnamed tensor", first, loss, step,
                "below" if rose else "above", learning_rate,
            )  # fmt: skip
        optimizer.step()
        on_step()
    return x.detach()


def _largest(x: torch.Tensor) -> float:
    """The largest magnitude, NaN where one is."""
    return float(torch.linalg.vector_norm(x, torch.inf))
