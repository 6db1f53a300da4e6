"""Losses that compare logits by rank, and so need no vocabulary map.

Notation, at position n: v the k largest logits of the pivot, t the k largest log-probabilities of
the source (its logits up to a constant), both by falling value; k is how many the source has there;
m(x) and s(x) the mean and standard deviation of k numbers.

InfiFusion (Yan et al. 2025, arXiv 2501.02795) keeps the top k logits, standardizes them and takes
the L1 distance, as universal logit distillation does (Boizard et al. 2024, arXiv 2402.12030):

    x^    = (x - m(x)) / s(x)                                                               (1)
    uld_n = 1/k sum_i |v^_i - t^_i|                                                         (2)

s has the divisor k - 1, as in the code of logit standardization (Sun et al. 2024, arXiv
2403.01427); its 1e-7 is added under the root, so that equal logits have a gradient (ours). A
position with fewer than two entries is at no distance. As (1) undoes any scale, a temperature
changes nothing and is not applied.

InfiGFusion (Wang et al. 2025, arXiv 2505.13893) adds to it the outer products of the top k logits
over a sequence G, a graph of vocabulary channels that are active together, and compares two graphs
by their sorted node features, in O(n log n) instead of the O(n^4) of Gromov-Wasserstein:

    a_n   = (x_n - x_nk) / (k s(x_n)), 0 for channels outside the top k                     (3)
    C     = 1/|G| sum_n a_n a_n',   f = C 1                                                 (4)
    gld_n = sum_r |f(pivot)_(r) - f(source)_(r)|, sorted by falling value, for n in G       (5)

Ours, since what could be read of the paper leaves them open: node features are row sums of C (with
the 1/k of (3): means over the channels active at a position); (3) is (1) measured from the smallest
of the k, because standardized logits sum to zero, and with them every row of C would too, and
because the graph then does not jump when a channel enters the top k; the shorter list of
nodes is filled up with zeros. Every position of G carries the distance of G, so that sums over
positions weigh sequences by length, as in the other losses. The authors train on gold, uld and gld
together, and so does `loss: gld` here: uld + gld with equal weight (ours).
"""

from __future__ import annotations

import torch

EPSILON = 1e-7
"""Of the standard deviation, for logits that are all equal."""


def uld_rows(values: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Eq. (2), [N].

    values: [N, k'] the pivot's largest logits, falling. probs: [N, K] of the source in any order, 0
    where unused.
    """
    values, source, active, _ = _paired(values, probs)
    count = active.sum(dim=1)
    difference = (_standard(values, active) - _standard(source, active)).abs()
    return torch.where(active, difference, 0).sum(dim=1) / count.clamp(min=1)


def gld_rows(
    values: torch.Tensor,
    columns: torch.Tensor,
    probs: torch.Tensor,
    ids: torch.Tensor,
    groups: torch.Tensor | None,
) -> torch.Tensor:
    """Eq. (5), [N]; 0 where the source has fewer than two entries.

    values: [N, k'] the pivot's largest logits, falling; columns: [N, k'] their ids. probs, ids:
    [N, K] of the source, whose vocabulary is its own; 0 and -1 where unused. groups: [N] sequences
    as any integers; None for one.
    """
    values, source, active, order = _paired(values, probs)
    channels = ids.long().gather(1, order)[:, : values.shape[1]]
    columns = columns[:, : values.shape[1]]
    kept = (active.sum(dim=1) > 1).nonzero()[:, 0]
    out = values.new_zeros(len(values))
    if not len(kept):
        return out
    group = groups[kept] if groups is not None else torch.zeros_like(kept)
    group = torch.unique(group, return_inverse=True)[1]
    sizes = torch.bincount(group)
    ours = _features(_activations(values[kept], active[kept]), columns[kept], group, sizes)
    theirs = _features(_activations(source[kept], active[kept]), channels[kept], group, sizes)
    width = max(ours.shape[1], theirs.shape[1])
    pad = torch.nn.functional.pad
    difference = pad(ours, (0, width - ours.shape[1])) - pad(theirs, (0, width - theirs.shape[1]))
    return out.index_put((kept,), difference.abs().sum(dim=1)[group])


def _paired(
    values: torch.Tensor, probs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pivot's logits and the source's log-probabilities, rank by rank.

    Two [N, k] tensors of the lesser width, a mask of the ranks that count, and the order [N, K] in
    which probs fall.
    """
    probs, order = probs.to(values.dtype).sort(dim=1, descending=True, stable=True)
    width = min(values.shape[1], probs.shape[1])
    probs = probs[:, :width]
    active = probs > 0
    return values[:, :width], torch.where(active, probs, 1).log(), active, order


def _spread(x: torch.Tensor, active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """m(x) and s(x) of the active entries of each row, [N, 1] each."""
    count = active.sum(dim=1, keepdim=True)
    mean = torch.where(active, x, 0).sum(dim=1, keepdim=True) / count.clamp(min=1)
    squares = torch.where(active, (x - mean).square(), 0).sum(dim=1, keepdim=True)
    return mean, (squares / (count - 1).clamp(min=1) + EPSILON**2).sqrt()


def _standard(x: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """Eq. (1); what it holds where not active means nothing."""
    mean, deviation = _spread(x, active)
    return (x - mean) / deviation


def _activations(x: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """Eq. (3) of rows with falling values."""
    count = active.sum(dim=1, keepdim=True)
    smallest = x.gather(1, count - 1)
    return torch.where(active, (x - smallest) / (count * _spread(x, active)[1]), 0)


def _features(
    activations: torch.Tensor, channels: torch.Tensor, group: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    """Eq. (4): the node features of every group, sorted by falling value. [groups, most nodes].

    C is never made: its row sums are sum_n a_n (a_n' 1).
    """
    flat = activations * activations.sum(dim=1, keepdim=True) / sizes[group, None]
    base = int(channels.max()) + 1
    keys = group[:, None] * base + channels.clamp(min=0)
    nodes, index = torch.unique(keys, return_inverse=True)
    features = flat.new_zeros(len(nodes)).index_add(0, index.reshape(-1), flat.reshape(-1))
    order = features.detach().argsort(descending=True, stable=True)
    owner = torch.div(nodes, base, rounding_mode="floor")
    order = order[owner[order].argsort(stable=True)]
    owner, features = owner[order], features[order]
    counts = torch.bincount(owner, minlength=len(sizes))
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(owner), device=owner.device) - starts[owner]
    out = flat.new_zeros(len(sizes), int(counts.max()))
    return out.index_put((owner, rank), features)
