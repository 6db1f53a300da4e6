"""A search as pictures: its history, which genes mattered, the trade-off between tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mergekit_unconstrained.search.study import Finished, mean

MOST_GENES = 20
ENOUGH = 20
"""Candidates that importance needs at least."""


def draw_all(
    history: Mapping[str, Sequence[Finished]],
    front: Sequence[Finished],
    importance: Mapping[str, float],
    folder: Path,
) -> dict[str, str]:
    """Draw what there is; title -> file name."""
    drawn = {}
    if any(history.values()):
        draw_history(history, folder / "history.png")
        drawn["History of the search"] = "history.png"
    if importance:
        draw_importance(importance, folder / "importance.png")
        drawn["Importance of the searched numbers"] = "importance.png"
    if len(front) > 1 and len(front[0].scores) > 1:
        draw_front(front, next(iter(history.values())), folder / "front.png")
        drawn["Trade-off between the first two tasks"] = "front.png"
    return drawn


def draw_history(history: Mapping[str, Sequence[Finished]], path: Path) -> None:
    """Every candidate's search score, and the best so far, for every study."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for index, (label, found) in enumerate(history.items()):
        colour = f"C{index}"
        whole = [(i, f.value) for i, f in enumerate(found, 1) if not f.failure and not f.dropped]
        early = [(i, f.value) for i, f in enumerate(found, 1) if f.dropped]
        if early:
            axes.plot(*zip(*early, strict=True), "x", ms=3, alpha=0.35, color=colour)
        if not whole:
            continue
        axes.plot(*zip(*whole, strict=True), ".", ms=4, alpha=0.45, color=colour)
        best = np.maximum.accumulate([v for _, v in whole])
        axes.step([i for i, _ in whole], best, where="post", color=colour, label=label, lw=1.8)
    axes.set_xlabel("candidate")
    axes.set_ylabel("search score")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    words = "best so far (line), scored in full (dot), dropped early (x, estimated)"
    axes.set_title(words, fontsize=9)
    figure.savefig(path, dpi=130)


def importance(finished: Sequence[Finished]) -> dict[str, float]:
    """Absolute rank correlation of every gene with the score (ours), the largest first.

    A monotone measure, which says little about genes whose best value lies in the middle. {} for
    fewer than ENOUGH candidates.
    """
    from scipy.stats import spearmanr

    whole = [f for f in finished if not f.failure and math.isfinite(f.value)]
    if len(whole) < ENOUGH:
        return {}
    scores = [f.value for f in whole]
    found = {}
    for gene in whole[0].values:
        values = [f.values[gene] for f in whole]
        if len(set(values)) > 1 and len(set(scores)) > 1:
            found[gene] = abs(float(spearmanr(values, scores).statistic))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def draw_importance(found: Mapping[str, float], path: Path) -> None:
    """The most important genes as bars."""
    from matplotlib.figure import Figure

    shown = list(found.items())[:MOST_GENES][::-1]
    figure = Figure(figsize=(7.2, 0.9 + 0.24 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.barh([name for name, _ in shown], [value for _, value in shown], color="C0")
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("absolute rank correlation with the search score")
    figure.savefig(path, dpi=130)


def draw_front(front: Sequence[Finished], everything: Sequence[Finished], path: Path) -> None:
    """The candidates that no other beats, over the first two tasks."""
    from matplotlib.figure import Figure

    one, two = list(front[0].scores)[:2]
    figure = Figure(figsize=(4.6, 4.0), layout="constrained")
    axes = figure.subplots()
    whole = [f for f in everything if not f.failure and not f.dropped]
    shown = ((whole, "0.7", 12, "candidates"), (front, "C3", 28, "beaten by none in both"))
    for found, colour, size, label in shown:
        x, y = ([mean(f.scores[task]) for f in found] for task in (one, two))
        axes.scatter(x, y, color=colour, s=size, label=label)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("mean scores on the search split", fontsize=9)
    axes.set_xlabel(one)
    axes.set_ylabel(two)
    figure.savefig(path, dpi=130)
