"""Merges that are linear combinations whose coefficients depend on inner products alone.

    result = O + sum_i c_i x_i,   x_i = T_i - O,   G_ij = <x_i, x_j>,   c = f(G)               (1)

with O the base model, or zero where a method has none. SLERP, its kin, the Karcher mean and Model
Stock all stay in the span of their inputs, so one pass over the tensors gives G and a second one
the result, however often a method iterates: what it iterates on are n coefficients.

G is taken of the offsets, never from differences of inner products of the tensors themselves, which
cancel: float32 over pieces of 65,536 entries (BLAS sums sixty-four partial sums at a time, so that
eight digits are right), float64 over the pieces. The coefficients are float64, the combination is
float32; float64 tensors are float64 throughout. mergekit does the same in the tensors' own dtype,
over whole tensors at each step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.numerics.pieces import pieces, scratch


@torch.no_grad()
def gram(tensors: Sequence[torch.Tensor], origin: torch.Tensor | None = None) -> np.ndarray:
    """G of (1), [n, n] float64. tensors, origin: one shape, any float dtypes."""
    narrow = all(t.dtype.itemsize <= 4 for t in tensors)
    total = _gram(tensors, origin, torch.float32 if narrow else torch.float64)
    if narrow and not np.isfinite(total).all():  # entries above 1e16
        total = _gram(tensors, origin, torch.float64)
    return total


def _gram(
    tensors: Sequence[torch.Tensor], origin: torch.Tensor | None, dtype: torch.dtype
) -> np.ndarray:
    flats = [t.reshape(-1) for t in tensors]
    o = None if origin is None else origin.reshape(-1)
    total = np.zeros((len(flats), len(flats)))
    *rows, start = scratch(flats[0], len(flats) + 1, dtype)
    for piece in pieces(flats[0]):
        size = len(flats[0][piece])
        x = [f[piece] for f in flats]
        if o is not None:
            s = start[:size].copy_(o[piece])
            x = [row[:size].copy_(x_i).sub_(s) for row, x_i in zip(rows, x, strict=True)]
        elif any(x_i.dtype != dtype for x_i in x):
            x = [row[:size].copy_(x_i) for row, x_i in zip(rows, x, strict=True)]
        for i, x_i in enumerate(x):
            for j in range(i + 1):
                total[i, j] += float(torch.dot(x_i, x[j]))
    return total + np.tril(total, -1).T


@torch.no_grad()
def combine(
    coefficients: Sequence[float],
    tensors: Sequence[torch.Tensor],
    origin: torch.Tensor | None = None,
) -> torch.Tensor:
    """The result of (1), of the shape and dtype of the first tensor."""
    first = tensors[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    flats = [t.reshape(-1) for t in tensors]
    o = None if origin is None else origin.reshape(-1)
    out = torch.empty_like(flats[0])
    mixed, start, offset = scratch(out, 3, dtype)
    for piece in pieces(out):
        target = out[piece]
        size = len(target)
        total, s, d = (target if out.dtype == dtype else mixed[:size]), start[:size], offset[:size]
        if o is not None:
            s.copy_(o[piece])
        for i, (flat, c) in enumerate(zip(flats, coefficients, strict=True)):
            x = (d if i else total).copy_(flat[piece])
            # The offset first: small numbers are summed before the large one is added.
            if o is not None:
                x.sub_(s)
            total = total.add_(x, alpha=c) if i else x.mul_(c)
        if o is not None:
            total.add_(s)
        if total is not target:
            target.copy_(total)
    return out.reshape(first.shape)


# -- f(G) of every method -------------------------------------------------------------------------
# n: norms, u = x / n: units, w: weights, m: a mean direction. The thresholds are mergekit's.


def slerp(g: np.ndarray, t: float, threshold: float = 0.9995) -> list[float]:
    """Shoemake 1985: sin((1-t) a) / sin a, sin(t a) / sin a for the angle a of two vectors.

    Linear above a cosine of `threshold`, as in mergekit.
    """
    n = np.sqrt(np.diag(g))
    n = np.where(n > 1e-8, n, 1)
    cosine = float(np.clip(g[0, 1] / (n[0] * n[1]), -1, 1))
    if abs(cosine) > threshold:
        return [1 - t, t]
    return _on_the_arc(cosine, t)


def nuslerp(g: np.ndarray, t: float) -> list[float]:
    """SLERP whose vectors are linear only where they are collinear to the last digit."""
    n = np.maximum(np.sqrt(np.diag(g)), 1e-7)
    cosine = float(np.clip(g[0, 1] / (n[0] * n[1]), -1, 1))
    if 1 - cosine**2 <= 1e-16:
        return [1 - t, t]
    return _on_the_arc(cosine, t)


def _on_the_arc(cosine: float, t: float) -> list[float]:
    a = np.arccos(cosine)
    return [float(np.sin((1 - t) * a) / np.sin(a)), float(np.sin(t * a) / np.sin(a))]


def multislerp(g: np.ndarray, weights: Sequence[float], eps: float = 1e-8) -> list[float]:
    """Barycentric interpolation on the sphere, in the tangent space at the weighted mean.

    weights: normalised where the recipe asks for it. Two vectors that cancel are averaged;
    ModelError where more than two do.
    """
    w = np.asarray(weights, dtype=np.float64)
    n = np.sqrt(np.diag(g))
    scale = 1 / (n + eps)  # u_i = scale_i x_i
    m = w * scale  # coefficients of sum w_i u_i
    length = float(np.sqrt(max(m @ g @ m, 0)))
    if length < eps:
        if len(w) == 2:
            return [float(x) for x in w]
        raise ModelError(
            "multislerp: the weighted sum of these tensors is zero, so they have no mean "
            "direction: choose other weights"
        )
    m /= length
    dots = scale * (g @ m)  # <u_i, m>
    tangent = w * scale - (w @ dots) * m  # sum w_i (u_i - <u_i, m> m)
    angle = float(np.sqrt(max(tangent @ g @ tangent, 0))) + eps
    direction = m * np.cos(angle) + tangent * (np.sin(angle) / angle)
    return [float(x) for x in direction * (n @ w)]


def karcher(g: np.ndarray, max_iter: int = 10, tol: float = 1e-5) -> list[float]:
    """The Karcher mean of the directions, times the mean of the norms (arXiv 2603.04972).

    Each step goes along the mean of the logarithms, all of it on coefficients. Zero vectors have no
    direction and count with norm zero.
    """
    n = np.sqrt(np.diag(g))
    valid = n > tol
    if not valid.any():
        return [0.0] * len(n)
    scale = np.where(valid, 1 / np.where(valid, n, 1), 0)  # u_i = scale_i x_i
    alpha = valid / valid.sum()

    def length(c: np.ndarray) -> float:
        return float(np.sqrt(max(c @ g @ c, 0)))

    mean = alpha * scale
    if (size := length(mean)) < tol:
        mean = np.zeros_like(scale)
        first = int(np.argmax(valid))
        mean[first] = scale[first]
    else:
        mean /= size
    for _ in range(max_iter):
        dots = np.clip(scale * (g @ mean), -1, 1)
        angles = np.arccos(dots)
        far = valid & (angles >= tol)
        pull = np.where(far, alpha * angles / np.where(far, np.sin(angles), 1), 0)
        tangent = pull * scale - (pull @ dots) * mean
        if (size := length(tangent)) < tol:
            break
        mean = np.cos(size) * mean + np.sin(size) * tangent / size
        if (size := length(mean)) > tol:
            mean /= size
    return [float(x) for x in mean * n.mean()]


def model_stock(g: np.ndarray) -> list[float]:
    """Model Stock (arXiv 2403.19522): t = k cos / (1 + (k - 1) cos), an equal t / k for each.

    g: of the offsets from the base. cos: the mean over the pairs. Where the denominator vanishes
    the base is kept, as in mergekit.
    """
    k = len(g)
    n = np.sqrt(np.diag(g))
    pairs = np.triu_indices(k, 1)
    cosines = np.clip(g[pairs] / np.maximum(np.outer(n, n)[pairs], 1e-6), -1, 1)
    cosine = float(cosines.mean())
    denominator = 1 + (k - 1) * cosine
    t = 0.0 if abs(denominator) < 1e-6 else k * cosine / denominator
    return [t / k] * k
