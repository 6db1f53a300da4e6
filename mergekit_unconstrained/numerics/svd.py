"""Thin singular value decompositions and polar factors, made once for all methods.

Everything is float64. A float32 matrix A, [m, n], goes the Gram route: the eigenvectors of A'A (of
AA' where that is smaller), whose rounding in float64 leaves singular values down to 1e-8 of the
largest, less than the rounding of A itself hides. A float64 matrix is decomposed directly.

Singular values below `tolerance` of the largest are zero: their vectors are anybody's choice, so
they are left out. The factors of a low-rank task vector have its rank, those of a zero one none.
Cost: O(m n min(m, n)) operations, about 9 min(m, n)^3 of them in the eigenvectors. Memory of the
Gram route: five float64 matrices of the smaller side's square, or two and the factors that are
asked for; A is widened a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

TOLERANCES = {torch.float32: 1e-7, torch.float64: 1e-13}
"""Relative to the largest singular value, by the dtype of the matrix."""
BLOCK = 1 << 20
"""Entries of a matrix widened at a time: 8 MiB in float64, against which a product takes long."""


class Factors(NamedTuple):
    """A = U diag(S) V', rank r, float64."""

    U: torch.Tensor  # [m, r], orthonormal columns
    S: torch.Tensor  # [r], descending, positive
    V: torch.Tensor  # [n, r], orthonormal columns

    def top(self, k: int) -> Factors:
        """The k largest, or all where there are fewer."""
        return Factors(self.U[:, :k], self.S[:k], self.V[:, :k])

    def product(self) -> torch.Tensor:
        """U diag(S) V', [m, n]."""
        return (self.U * self.S) @ self.V.T


def thin_svd(a: torch.Tensor, k: int | None = None, *, by_gram: bool | None = None) -> Factors:
    """The decomposition of a finite matrix, float32 or float64.

    k: how many of the largest are wanted, all there are for None. by_gram: None for float32 alone;
    float64 may go that way too where small singular values do not matter. Signs: the entry of
    largest magnitude of every column of U is positive, the first of equal ones.
    """
    m, n = a.shape
    scale = max(-float(a.min()), float(a.max())) if a.numel() else 0.0
    if scale == 0 or k == 0:
        return Factors(*(a.new_zeros(size, dtype=torch.float64) for size in ((m, 0), 0, (n, 0))))
    by_gram = a.dtype != torch.float64 if by_gram is None else by_gram
    tolerance = TOLERANCES[torch.float32 if by_gram else a.dtype]
    # Divided by the scale first: squares of tiny or huge entries stay in range.
    if not by_gram:
        U, S, Vh = torch.linalg.svd(a / scale, full_matrices=False)
        r = int((S / S[0] > tolerance).sum())
        r = r if k is None else min(r, k)
        U, S, V = U[:, :r], S[:r], Vh[:r].T
    elif m >= n:
        U, S, V = _by_gram(a, scale, k, tolerance)
    else:
        V, S, U = _by_gram(a.T, scale, k, tolerance)
    for columns in _spans(U.shape[1], U.shape[0]):
        largest = U[:, columns].abs().argmax(dim=0, keepdim=True)
        signs = torch.gather(U[:, columns], 0, largest).sign()
        U[:, columns] *= signs
        V[:, columns] *= signs
    return Factors(U, S * scale, V)


def _by_gram(
    a: torch.Tensor, scale: float, k: int | None, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, S, V of a tall matrix divided by a scale."""
    m, n = a.shape
    gram = torch.zeros((n, n), dtype=torch.float64, device=a.device)
    for rows in _spans(m, n):
        block = a[rows].to(torch.float64, copy=True).div_(scale)
        gram.addmm_(block.T, block)
    squares, Q = torch.linalg.eigh(gram)
    del gram
    S = squares.flip(0).clamp(min=0).sqrt()
    r = int((S / S[0] > tolerance).sum())
    r = r if k is None else min(r, k)
    S, V = S[:r].clone(), Q[:, n - r :].flip(1)
    del Q
    U = torch.empty((m, r), dtype=torch.float64, device=a.device)
    for rows in _spans(m, n):
        torch.mm(a[rows].to(torch.float64, copy=True).div_(scale), V, out=U[rows])
    U /= U.norm(dim=0)
    return U, S, V


def _spans(count: int, width: int) -> Iterator[slice]:
    """As many of the rows of a width at a time as come to BLOCK entries."""
    step = max(1, BLOCK // max(1, width))
    for start in range(0, count, step):
        yield slice(start, start + step)


def polar_factor(a: torch.Tensor) -> torch.Tensor:
    """The partial isometry W of A = W (A'A)^(1/2), float64, [m, k] like A.

    The nearest matrix with orthonormal columns where A has full column rank; where columns depend
    on each other, W maps their null space to zero and stays unique.
    """
    squares, Q = torch.linalg.eigh(a.T @ a)
    if not squares.numel():
        return a
    kept = squares > 1e-12 * squares[-1]
    Q = Q[:, len(kept) - int(kept.sum()) :]  # in ascending order
    W = torch.empty_like(a)
    for rows in _spans(*a.shape):
        W[rows] = (a[rows] @ Q).mul_(squares[kept].rsqrt()) @ Q.T
    return W
