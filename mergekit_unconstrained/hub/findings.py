"""What the figures of an evaluation say, in sentences: better, worse, and whether beyond chance.

One rule for gains and losses alike: a difference counts as more than chance from two of its
standard errors on. They are those of the paired difference where the same examples' scores are at
hand, else those of independent samples, which are larger wherever models find the same examples
hard. Nothing is corrected for the number of comparisons, and the card says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_unconstrained.hub.facts import THIS_MODEL, CardFacts, Score

LOWER_IS_BETTER = ("bits per byte", "perplexity")
BEYOND_CHANCE = 2.0
"""Standard errors."""
FEW = 30
"""Of fewer examples the standard errors themselves are said to be rough."""
SFT = "SFT on the same data"


def reading(facts: CardFacts) -> tuple[str, ...]:
    """How the units of the evaluation, its rows and its differences are read."""
    metrics = {score.metric for score in facts.evaluation}
    found = [f"Of {m}, less is better." for m in LOWER_IS_BETTER if m in metrics]
    if any(metric.startswith("nats") for metric in metrics):
        found.append("Nats are log-likelihoods: nearer to zero is better.")
    rows = {score.model for score in facts.evaluation}
    if any(row.startswith("target of ") for row in rows) and facts.fusion is not None:
        found.append("target of X: the pivot trained on the targets of X alone, before the merge.")
    if SFT in rows:
        found.append(f"{SFT}: the pivot fine-tuned without any teacher, all else alike.")
    return (*found, *_rule(facts))


def _rule(facts: CardFacts) -> tuple[str, ...]:
    """By what a difference is judged."""
    others = [s for own in _own(facts) for s in _others(facts, own)]
    paired = [s.paired is not None for s in others]
    if not others:
        return ()
    if all(paired):
        which = "paired over the same examples"
    elif any(paired):
        which = (
            "paired over the same examples where the scores of single ones are at hand, and as of "
            "independent samples elsewhere"
        )
    else:
        which = (
            "as of independent samples, since the scores of single examples are not at hand; "
            "paired ones would be sharper"
        )
    found = [
        f"Differences are told in their standard errors, {which}; from two of these on a "
        "difference counts as more than chance. Nothing was corrected for the number of "
        "comparisons."
    ]
    few = sorted({s.n for s in facts.evaluation if s.n is not None and s.n < FEW})
    if few:
        found.append(f"Of so few examples (n = {few[0]}) the standard errors are rough themselves.")
    return tuple(found)


def finding(facts: CardFacts) -> tuple[str, ...]:
    """A sentence for every task: this model beside its base, its best parent and the baselines."""
    found = []
    for own in _own(facts):
        others = _others(facts, own)
        said = []
        for what, names in _groups(facts):
            rows = [s for s in others if s.model in names]
            if not rows:
                continue
            best = max(rows, key=lambda s: _sign(own) * s.value)
            name = f"{what}, {best.model}," if len(rows) > 1 else what.replace("best ", "")
            said.append(f"{_verdict(own, best)} {name}".rstrip(","))
        if said:
            sentence = "; ".join(said)
            on = "" if own.n is None else f" (n = {own.n})"
            found.append(f"{own.task}{on}: this model is {sentence}.")
    return tuple(found)


def _groups(facts: CardFacts) -> list[tuple[str, set[str]]]:
    """What this model is compared with, and the rows that are of it."""
    base, experts = facts.base, [p.name for p in facts.experts]
    rows = {s.model for s in facts.evaluation}
    own = {f"{base.role} {base.name}", base.name} if base is not None else set()
    teachers = {row for row in rows if row.startswith("source ")} if facts.fusion else set()
    parents = teachers | {row for row in rows if row in experts} - own
    return [
        (f"its {base.role}" if base is not None else "", own),
        ("its best source" if facts.fusion else "its best expert", parents),
        ("plain fine-tuning on the same data", {SFT}),
        ("its best single target", {row for row in rows if row.startswith("target of ")}),
        ("the best uniform merge", {row for row in rows if row.startswith("uniform")}),
    ]


def _verdict(own: Score, other: Score) -> str:
    """`better than`, `worse than` or what cannot be said, with the distance."""
    gap = -_behind(own, other)
    error = _error(own, other)
    if not gap:
        return "as good as"
    if not error:
        return f"{'above' if gap > 0 else 'below'} (by how much more than chance is not known)"
    distance = f"{abs(gap) / error:.1f} standard errors"
    if abs(gap) >= BEYOND_CHANCE * error:
        return f"{'better' if gap > 0 else 'worse'} ({distance}) than"
    if gap > 0:
        return f"not better beyond chance ({distance} above) than"
    return f"not better ({distance} below, may be chance) than"


def worse(facts: CardFacts) -> tuple[str, ...]:
    """What this model is worse at than another one in its evaluation, in sentences."""
    found = []
    for own in _own(facts):
        others = _others(facts, own)
        for other in sorted(others, key=lambda s: -_sign(own) * s.value):
            gap = _behind(own, other)
            if gap <= 0:
                continue
            said = f"{own.task}: {own.value:.4g} {own.metric} against {other.value:.4g} of "
            said += other.model
            error = _error(own, other)
            if error:
                said += f", {gap / error:.1f} standard errors worse"
                said += " (may be chance)" if gap < BEYOND_CHANCE * error else ""
            found.append(said + ".")
    return tuple(found)


def _own(facts: CardFacts) -> list[Score]:
    return [score for score in facts.evaluation if score.model == THIS_MODEL]


def _others(facts: CardFacts, own: Score) -> Sequence[Score]:
    """The other models' scores on the same task."""
    question = (own.task, own.metric)
    return [s for s in facts.evaluation if (s.task, s.metric) == question and s.model != own.model]


def _sign(own: Score) -> float:
    return -1.0 if own.metric in LOWER_IS_BETTER else 1.0


def _behind(own: Score, other: Score) -> float:
    """By how much the other model is better."""
    return _sign(own) * (other.value - own.value)


def _error(own: Score, other: Score) -> float:
    """The standard error of the difference; 0 where none is known."""
    if other.paired is not None:
        return other.paired
    return math.hypot(own.stderr or 0.0, other.stderr or 0.0)
