"""Thin singular value decompositions and polar factors, made once for all methods.

Everything is float64. A float32 matrix A, [m, n], goes the Gram route: the eigenvectors of A'A (of
AA' where that is smaller), whose rounding in float64 leaves singular values down to 1e-8 of the
largest, less than the rounding of A itself hides. A float64 matrix is decomposed directly.

Singular values below `tolerance` of the largest are zero: their vectors are anybody's choice, so
they are left out. The factors of a low-rank task vector have its rank, those of a zero one none.
Cost: O(m n min(m, n)) operations, about 9 min(m, n)^3 of them in the eigenvectors; memory for a few
float64 matrices of the shape of A, beside what the caller keeps (its docstring has the peak).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

TOLERANCES = {torch.float32: 1e-7, torch.float64: 1e-13}
"""Relative to the largest singular value, by the dtype of the matrix."""


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


def thin_svd(a: torch.Tensor) -> Factors:
    """The decomposition of a finite matrix, float32 or float64.

    Signs: the entry of largest magnitude of every column of U is positive, the first of equal ones.
    """
    m, n = a.shape
    scale = a.abs().max() if a.numel() else a.new_zeros(())
    if scale == 0:
        return Factors(*(a.new_zeros(size, dtype=torch.float64) for size in ((m, 0), 0, (n, 0))))
    exact = a.double() / scale.double()  # squares of tiny or huge entries stay in range
    if a.dtype == torch.float64:
        U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
        V = Vh.T
    elif m >= n:
        U, S, V = _by_gram(exact)
    else:
        V, S, U = _by_gram(exact.T)
    r = int((S / S[0] > TOLERANCES[a.dtype]).sum())
    U, S, V = U[:, :r], S[:r], V[:, :r]
    signs = torch.gather(U, 0, U.abs().argmax(dim=0, keepdim=True)).sign()
    return Factors(U * signs, S * scale.double(), V * signs)


def _by_gram(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, S, V of a tall matrix; columns of U whose singular value is nearly zero mean nothing."""
    squares, V = torch.linalg.eigh(a.T @ a)
    V = V.flip(1)
    images = a @ V
    S = squares.flip(0).clamp(min=0).sqrt()
    return images / images.norm(dim=0).clamp(min=torch.finfo(a.dtype).tiny), S, V


def polar_factor(a: torch.Tensor) -> torch.Tensor:
    """The partial isometry W of A = W (A'A)^(1/2), float64, [m, k] like A.

    The nearest matrix with orthonormal columns where A has full column rank; where columns depend
    on each other, W maps their null space to zero and stays unique.
    """
    squares, Q = torch.linalg.eigh(a.T @ a)
    if not squares.numel():
        return a
    kept = squares > 1e-12 * squares[-1]
    Q = Q[:, kept]
    return (a @ Q) * squares[kept].rsqrt() @ Q.T
