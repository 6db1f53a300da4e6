"""What training minimises: gold cross-entropy, and a distance to sparse fused targets.

Notation, at one position: z the pivot's logits, q = softmax(z), T the temperature, q_T =
softmax(z / T), V the vocabulary; the target P*: probabilities p_k on at most K ids, and `rest`, the
mass of all other tokens together. Over the N positions of a batch, with lambda = lm_loss_weight:

    L        = sum_n lambda * gold_n + (1 - lambda) * used_n * fusion_n                      (1)
    gold     = -log q(gold)                                                                  (2)
    fused_ce = -T^2 [ sum_k p_k log q_T(k) + rest * log(1 - sum_k q_T(k)) ]                  (3)
    fused_kl = fused_ce + T^2 [ sum_k p_k log p_k + rest * log rest ]                        (4)

(1), (3) at T = 1 and (4) are FuseLLM's (Wan et al. 2024, arXiv 2401.10491) and FuseChat's (arXiv
2402.16107); lambda is 0.9 there. T^2 keeps the size of the gradients (Hinton et al. 2015, arXiv
1503.02531). (4) differs from (3) by a constant, so both train alike. `rest` is ours.

Label smoothing e (Szegedy et al. 2016, arXiv 1512.00567) replaces P* in (3) and (4) by
(1 - e) P* + e / V; with it (4) is the same mixture of two divergences (ours). It is a control:
what it gains, any blurred target would.

`uld` and `gld` need no vocabulary map; their equations are in ranked.py.

A target is never made dense: (3) takes the gathered q_k and one log-sum-exp, which (2) shares when
T = 1 (readout.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.fusion.settings import LossName
from mergekit_unconstrained.fusion.training.ranked import gld_rows, uld_rows
from mergekit_unconstrained.fusion.training.readout import Readout, read, top_columns


@dataclass(frozen=True, eq=False)
class LossParts:
    """Sums over the positions of a batch, for the caller to divide.

    loss: Eq. (1), differentiable. gold, fusion: its two sums without their weights, detached; the
    latter is 0 at lm_loss_weight 1. count: positions with a gold token; used: those with a target.
    """

    loss: torch.Tensor
    gold: torch.Tensor
    fusion: torch.Tensor
    count: torch.Tensor
    used: torch.Tensor


def combined(
    logits: torch.Tensor,
    gold: torch.Tensor,
    ids: torch.Tensor,
    probs: torch.Tensor,
    rest: torch.Tensor | None,
    used: torch.Tensor,
    *,
    loss: LossName,
    lm_loss_weight: float,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    groups: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> LossParts:
    """Eq. (1): everything a training step needs, from one pass over the logits.

    logits: [N, V], any float dtype, row n predicting gold[n]. gold: [N], negative where nothing is
    to be learnt: such a position counts nowhere. ids: [N, K], -1 unused, no id twice in a row; for
    uld and gld the source's own ids. probs: [N, K]; for uld and gld of the source. rest: [N] or
    None for zeros. used: [N] bool; a position without a target keeps lambda * gold. groups: [N],
    for gld: which sequence a position belongs to; None for one. rows: [N] int64: logits are [M, V]
    and position n is row rows[n] of them (none twice), so that no caller gathers a copy.

    At lm_loss_weight 1 this is torch's cross_entropy, summed.
    """
    learnt = gold >= 0
    if not bool(learnt.all()):
        # What has no gold token is left out; the logits stay where they are.
        kept = learnt.nonzero()[:, 0]
        rows = kept if rows is None else rows[kept]
        gold, ids, probs, used = gold[kept], ids[kept], probs[kept], used[kept]
        rest = None if rest is None else rest[kept]
        groups = None if groups is None else groups[kept]
    gold_column = gold.long()[:, None]
    nothing = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
    if lm_loss_weight == 1:
        out = read(logits, gold_column, rows=rows)
        gold_sum = (out.total - out.values[:, 0]).sum()
        fusion_sum, total = nothing, gold_sum
    else:
        if loss in ("uld", "gld"):
            _refuse_smoothing(loss, label_smoothing)
            out, fusion = _ranked(
                logits, gold_column, ids, probs, used, rows, groups, graph=loss == "gld"
            )
        else:
            out, fusion = _matched(
                logits, gold_column, ids, probs, rest, rows, loss, label_smoothing, temperature
            )
        gold_sum = (out.total - out.values[:, 0]).sum()
        fusion_sum = torch.where(used, fusion, nothing).sum()
        total = lm_loss_weight * gold_sum + (1 - lm_loss_weight) * fusion_sum
    return LossParts(
        loss=total,
        gold=gold_sum.detach(),
        fusion=fusion_sum.detach(),
        count=torch.tensor(len(gold), device=logits.device),
        used=used.sum(),
    )


def fused_ce(
    logits: torch.Tensor,
    ids: torch.Tensor,
    probs: torch.Tensor,
    rest: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Eq. (3) at every position, [N]; arguments as in `combined`."""
    none = ids.new_empty((len(ids), 0), dtype=torch.long)
    out = _matched(logits, none, ids, probs, rest, None, "fused_ce", label_smoothing, temperature)
    return out[1]


def fused_kl(
    logits: torch.Tensor,
    ids: torch.Tensor,
    probs: torch.Tensor,
    rest: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Eq. (4) at every position, [N]; arguments as in `combined`."""
    none = ids.new_empty((len(ids), 0), dtype=torch.long)
    out = _matched(logits, none, ids, probs, rest, None, "fused_kl", label_smoothing, temperature)
    return out[1]


def uld(logits: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """ranked.py, Eq. (2), at every position, [N]; probs: [N, K] of the source, 0 unused."""
    columns = top_columns(logits, min(probs.shape[1], logits.shape[1]))
    return uld_rows(read(logits, columns).values, probs)


def gld(
    logits: torch.Tensor,
    ids: torch.Tensor,
    probs: torch.Tensor,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """ranked.py, Eq. (5), at every position, [N]; ids: [N, K] of the source, groups: [N]."""
    columns = top_columns(logits, min(probs.shape[1], logits.shape[1]))
    return gld_rows(read(logits, columns).values, columns, probs, ids, groups)


def _matched(
    logits: torch.Tensor,
    gold_column: torch.Tensor,
    ids: torch.Tensor,
    probs: torch.Tensor,
    rest: torch.Tensor | None,
    rows: torch.Tensor | None,
    loss: LossName,
    smoothing: float,
    temperature: float,
) -> tuple[Readout, torch.Tensor]:
    """Eq. (3) or (4) at every position, and what was read; gold_column: [N, 0 or 1]."""
    ids = ids.long()
    bucket = rest is not None and bool(rest.any())
    out = read(
        logits,
        torch.cat([gold_column, ids.clamp(min=0)], dim=1),
        rows=rows,
        temperature=temperature,
        mean=smoothing > 0,
        listed=ids if bucket else None,
    )
    p = torch.where(ids >= 0, probs, 0).to(out.total.dtype)
    surprise = out.warm[:, None] - out.values[:, gold_column.shape[1] :] / temperature
    # An id without mass has no say, however unlikely it is: not 0 * inf.
    fusion = torch.where(p > 0, p * surprise, 0).sum(dim=1)
    if loss == "fused_kl":
        fusion = fusion + torch.xlogy(p, p).sum(dim=1)
    if rest is not None and out.others is not None:
        rest = rest.to(p.dtype)
        fusion = fusion + torch.where(rest > 0, rest * (out.warm - out.others), 0)
        if loss == "fused_kl":
            fusion = fusion + torch.xlogy(rest, rest)
    if out.mean is not None:
        uniform = out.warm - out.mean / temperature
        if loss == "fused_kl":
            uniform = uniform - torch.log(uniform.new_tensor(logits.shape[1]))
        fusion = (1 - smoothing) * fusion + smoothing * uniform
    return out, temperature**2 * fusion


def _ranked(
    logits: torch.Tensor,
    gold_column: torch.Tensor,
    ids: torch.Tensor,
    probs: torch.Tensor,
    used: torch.Tensor,
    rows: torch.Tensor | None,
    groups: torch.Tensor | None,
    *,
    graph: bool,
) -> tuple[Readout, torch.Tensor]:
    """uld, or uld + gld, at every position, and what was read."""
    probs = probs * used[:, None]
    columns = top_columns(logits, min(probs.shape[1], logits.shape[1]), rows)
    out = read(logits, torch.cat([gold_column, columns], dim=1), rows=rows)
    fusion = uld_rows(out.values[:, 1:], probs)
    if graph:
        fusion = fusion + gld_rows(out.values[:, 1:], columns, probs, ids, groups)
    return out, fusion


def _refuse_smoothing(loss: str, smoothing: float) -> None:
    if smoothing:
        raise RecipeError(
            f"label_smoothing means nothing to the loss {loss}, which compares ranks: use fused_ce "
            "or fused_kl, or label_smoothing: 0"
        )
