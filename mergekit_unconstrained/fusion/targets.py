"""Fused targets: which model's distribution the pivot is trained towards, position by position.

Every candidate (the pivot's own distributions, the aligned ones of each source) is first completed
by the two rules below; then one of them wins, or they are mixed. Mixtures add up by id, so that one
of M candidates with k entries each has up to M k of them.

rest: what becomes of the mass outside the source's top k and of entries without a counterpart in
the pivot's vocabulary.
    renormalize   spread over the kept entries in proportion. No distribution where no entry is
                  kept, or where those without a counterpart held more than the kept ones (ours):
                  what the source meant there is mostly unknown
    gold          given to the token that came
    bucket        kept as the mass of all tokens not listed. Of a mixture: the mixed mass of the
                  candidates' rests, against all tokens that none of them lists
unaligned: what a candidate says where it has no distribution.
    gold          a one-hot on the token that came
    skip          nothing: where it wins there is no target, and a mixture goes without it; nor does
                  the one-hot count that the published alignment gives there of its own accord
Neither hands the position to another candidate: who wins is settled before.

With C_m the cross-entropy of candidate m on the response, FuseLLM (Wan et al. 2024, arXiv
2401.10491) and FuseChat (arXiv 2402.16107) take min_ce, the lowest C_m, or avg_ce, weights
softmax(-C_m). FuseLLM's code takes softmax(1 / exp(C_m)) instead, which lies between 0 and 1 before
the softmax and so is nearly uniform: not offered. They measure C_m in nats per token, which favours
the finer tokenizer; the default here is bits per byte (ours). Ours as well: a winner or weights per
token, `weighted`, and `max_margin`: of several sources, learn from the most distinctive one, as
InfiFPO (Gu et al. 2025, arXiv 2505.13878) does with likelihoods of whole responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.fusion.mixing import chosen, completed_by_rules, mixture, summed
from mergekit_unconstrained.fusion.records import (
    Encoded,
    Floats,
    FusedTargets,
    Ints,
    Origin,
    Record,
    SparseDistributions,
    TopK,
)
from mergekit_unconstrained.fusion.settings import TargetName

Doubles = npt.NDArray[np.float64]

NATS_OF_A_TOKEN = 4 * np.log(2)
"""Bits per byte times this are the nats of four bytes, about a token, so that the weights of avg_ce
are as sharp as the published ones (ours)."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """What one model has to say of a response of r tokens of the pivot.

    bits_per_byte, nats_per_token: its cross-entropy on its own tokens of the response; nan for an
    empty one. token_bits [r]: bits per byte at each of the pivot's tokens; needed per token only.
    """

    distributions: SparseDistributions
    bits_per_byte: float
    nats_per_token: float
    token_bits: Floats | None = None


def own_distributions(topk: TopK) -> SparseDistributions:
    """The pivot's own distributions as a candidate: nothing to align, nothing unmapped."""
    probs = np.where(topk.ids >= 0, np.exp(topk.log_probs), 0).astype(np.float32)
    return SparseDistributions(
        ids=topk.ids,
        probs=probs,
        tail=topk.tail,
        unmapped=np.zeros_like(topk.tail),
        origin=np.full(len(topk.ids), Origin.OWN, dtype=np.uint8),
    )


def token_bits(record: Record, pivot: Encoded) -> Floats:
    """A model's bits per byte at each of the pivot's tokens, [r].

    The bits of each of its own tokens are spread evenly over the bytes it covers, those of a token
    of no bytes go to the token after it (the last one's to the one before), and a token of the
    pivot takes the mean over its bytes that are covered (ours). inf where none is.
    """
    wide = record.ends > record.starts
    if not wide.any():
        return np.full(len(pivot.starts), np.inf, dtype=np.float32)
    spent = np.cumsum(-record.topk.gold.astype(np.float64) / np.log(2))
    total = spent[-1]
    spent = spent[wide]
    spent[-1] = total
    starts, ends = record.starts[wide], record.ends[wide]
    # Two steps a token, as not every byte need be covered: there the sums stand still.
    knots = np.stack([starts, ends], axis=1).reshape(-1)
    bits = np.repeat(np.concatenate([[0.0], spent]), 2)[1:-1]
    covered = np.repeat(np.concatenate([[0], np.cumsum(ends - starts)]), 2)[1:-1]
    size = np.interp(pivot.ends, knots, covered) - np.interp(pivot.starts, knots, covered)
    spent = np.interp(pivot.ends, knots, bits) - np.interp(pivot.starts, knots, bits)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(size > 0, spent / size, np.inf).astype(np.float32)


def rank_targets(record: Record, pivot: Encoded) -> FusedTargets:
    """A source's own top k where both tokenisations have a token that begins at the same byte.

    For the losses that compare ranks (uld, gld): ids are the source's, and nothing is mapped. That
    positions are matched by shared byte starts is ours.
    """
    count, k = len(pivot.starts), record.topk.ids.shape[1]
    # Of tokens that begin together (only the last has bytes) the last one says what comes there.
    found = np.searchsorted(record.starts, pivot.starts, side="right") - 1
    used = np.zeros(count, dtype=np.bool_)
    if len(record.starts):
        used = (found >= 0) & (record.starts[found] == pivot.starts)
    ids = np.full((count, k), -1, dtype=np.int32)
    probs = np.zeros((count, k), dtype=np.float32)
    ids[used] = record.topk.ids[found[used]]
    probs[used] = np.exp(record.topk.log_probs[found[used]])
    probs[ids < 0] = 0
    return FusedTargets(ids, probs, np.zeros(count, dtype=np.float32), used, winner=1)


def fuse(
    candidates: Sequence[Candidate],
    gold: Ints,
    *,
    target: TargetName,
    per: Literal["sequence", "token"] = "sequence",
    compare: Literal["bits_per_byte", "nats_per_token"] = "bits_per_byte",
    rest: Literal["renormalize", "gold", "bucket"] = "renormalize",
    unaligned: Literal["gold", "skip"] = "gold",
    weights: Sequence[float] | None = None,
    include_pivot: bool = True,
) -> FusedTargets:
    """The target of one response.

    candidates: of r positions each; the first is the pivot's own if include_pivot. gold [r]: the
    pivot's tokens that came.

    min_ce      the lowest cross-entropy wins, of equal ones the first. Per token by token_bits,
                whatever `compare` says: there all are measured on the pivot's tokens.
    avg_ce      a mixture with weights softmax(-cross-entropy), in nats per token, or per four bytes
    weighted    a mixture with the `weights`: one per source, or one per candidate. In the former
                case the pivot's own has the mean of the sources' (ours). Equal ones if None
    max_margin  the source furthest from the pivot's own wins: by total variation of absolute
                probabilities, everything not listed as one class; per sequence by its mean over the
                positions that were transferred
    teacher     the only source wins; the pivot's own is not asked

    RecipeError for a rule that does not fit the candidates.
    """
    first = 0 if include_pivot else 1
    if target in ("avg_ce", "weighted"):
        if target == "weighted":
            share = _given_weights(len(candidates), weights, include_pivot)
        else:
            share = _softmax(-_costs(candidates, per, compare, nats=True))
        return mixture(
            [completed_by_rules(c.distributions, gold, rest, unaligned) for c in candidates], share
        )
    if target == "min_ce":
        winner = _costs(candidates, per, compare).argmin(axis=0)
    elif target == "max_margin":
        winner = _most_distinctive(candidates, per, include_pivot)
    else:
        winner = np.array(_only_source(len(candidates), include_pivot))
    if winner.size == 0 or (winner == winner.flat[0]).all():
        index = int(winner.flat[0]) if winner.size else 0
        found = completed_by_rules(candidates[index].distributions, gold, rest, unaligned)
        return FusedTargets(found.ids, found.probs, found.rest, found.used, winner=index + first)
    completed = [completed_by_rules(c.distributions, gold, rest, unaligned) for c in candidates]
    return chosen(completed, winner)


# -- who wins -------------------------------------------------------------------------------------


def _costs(
    candidates: Sequence[Candidate], per: str, compare: str, *, nats: bool = False
) -> Doubles:
    """Cross-entropies, [M] or [M, r]; inf where unknown. nats: of four bytes, not bits of one."""
    bits = True
    if per == "token":
        rows = [c.token_bits for c in candidates]
        if any(row is None for row in rows):
            raise ValueError("a winner per token needs the token_bits of every candidate")
        costs = np.array(rows, dtype=np.float64)
    elif compare == "bits_per_byte":
        costs = np.array([c.bits_per_byte for c in candidates], dtype=np.float64)
    else:
        costs, bits = np.array([c.nats_per_token for c in candidates], dtype=np.float64), False
    costs = np.where(np.isnan(costs), np.inf, costs)
    return costs * NATS_OF_A_TOKEN if nats and bits else costs


def _softmax(scores: Doubles) -> Doubles:
    """Over axis 0; uniform where every score is -inf."""
    best = scores.max(axis=0)
    known = np.exp(np.where(np.isinf(best), 0, scores - np.where(np.isinf(best), 0, best)))
    return known / known.sum(axis=0)


def _given_weights(count: int, weights: Sequence[float] | None, include_pivot: bool) -> Doubles:
    """Normalised, one per candidate."""
    share = np.ones(count) if weights is None else np.array(weights, dtype=np.float64)
    if include_pivot and len(share) == count - 1:
        share = np.concatenate([[share.mean()], share])
    if len(share) != count:
        raise ValueError(f"{len(share)} weights for {count} candidates")
    if not (np.isfinite(share).all() and (share >= 0).all() and share.sum() > 0):
        raise RecipeError(
            f"target weighted cannot mix by the weights {[float(w) for w in share]}: give every "
            "source a weight of 0 or more, and at least one of them more than 0"
        )
    return share / share.sum()


def _most_distinctive(
    candidates: Sequence[Candidate], per: str, include_pivot: bool
) -> npt.NDArray[np.intp]:
    """The winner of max_margin, [] or [r]; a source that was transferred nowhere comes last."""
    sources = candidates[1:] if include_pivot else candidates
    if len(sources) == 1:
        return np.array(int(include_pivot))
    if not include_pivot:
        raise RecipeError(
            "target max_margin measures how far each source is from the pivot's own distributions: "
            "set include_pivot: true, or choose another target"
        )
    margins = np.stack([_margins(candidates[0].distributions, s.distributions) for s in sources])
    if per == "sequence":
        known = np.isfinite(margins)
        sums = np.where(known, margins, 0).sum(axis=1)
        counts = known.sum(axis=1)
        margins = np.where(counts > 0, sums / np.maximum(counts, 1), -np.inf)
    return margins.argmax(axis=0) + 1


def _margins(own: SparseDistributions, other: SparseDistributions) -> Doubles:
    """Total variation at each position, [r]; -inf where nothing was transferred."""
    _, difference = summed(
        np.concatenate([own.ids, other.ids], axis=1),
        np.concatenate([own.probs, -other.probs], axis=1),
    )
    outside = (own.tail + own.unmapped) - (other.tail + other.unmapped)
    margins = (np.abs(difference).sum(axis=1) + np.abs(outside)) / 2
    transferred = ~np.isin(other.origin, (Origin.NONE, Origin.GOLD))
    return np.where(transferred, margins.astype(np.float64), -np.inf)


def _only_source(count: int, include_pivot: bool) -> int:
    sources = count - include_pivot
    if sources != 1:
        raise RecipeError(
            f"target teacher takes one source, not {sources}: set pairing: pairwise, or choose "
            "another target"
        )
    return int(include_pivot)
