"""What the figures of an evaluation say, in sentences: better, worse, and whether beyond chance.

One rule for gains and losses alike: a difference counts as more than chance from two of its
standard errors on. They are those of the paired difference where the same examples' scores are at
hand, else those of independent samples, which are larger wherever models find the same examples
hard. Nothing is corrected for the number of comparisons, and the card says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_unconstrained.hub.facts import THIS_MODEL, CardFacts, Score, listed

LOWER_IS_BETTER = ("bits per byte", "perplexity")
BEYOND_CHANCE = 2.0
"""Standard errors."""
FEW = 30
"""Of fewer examples the standard errors themselves are said to be rough."""
SFT = "SFT on the same data"
TARGET = "target of "


def reading(facts: CardFacts) -> tuple[str, ...]:
    """How the units of the evaluation, its rows and its differences are read."""
    metrics = {score.metric for score in facts.evaluation}
    found = [f"Of {m}, less is better." for m in LOWER_IS_BETTER if m in metrics]
    if any(metric.startswith("nats") for metric in metrics):
        found.append("Nats are log-likelihoods: nearer to zero is better.")
    rows = {score.model for score in facts.evaluation}
    if any(row.startswith(TARGET) for row in rows) and facts.fusion is not None:
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
        which = "a paired one, over the same examples"
    elif any(paired):
        which = (
            "a paired one, over the same examples, where the scores of single ones are at hand, "
            "elsewhere one of independent samples"
        )
    else:
        which = (
            "one of independent samples, since the scores of single examples are not at hand; a "
            "paired one would be sharper"
        )
    found = [
        f"A difference counts as more than chance from two of its standard errors on ({which}), "
        "for better and worse alike; nothing is corrected for the number of comparisons."
    ]
    few = sorted({s.n for s in facts.evaluation if s.n is not None and s.n < FEW})
    if few:
        found.append(f"Of so few examples (n = {few[0]}) the standard errors are rough themselves.")
    return tuple(found)


def finding(facts: CardFacts) -> tuple[str, ...]:
    """A sentence for every task: this model beside its base, its best parent and the baselines."""
    found = []
    for own in _own(facts):
        said = []
        for what, best_of, rows in _groups(facts, _others(facts, own)):
            best = max(rows, key=lambda s: _sign(own) * s.value, default=None)
            if best is not None:
                name = f"{best_of} {rows[best]}" if len(rows) > 1 else what
                said.append(_verdict(own, best, name))
        if said:
            on = "these examples" if own.n is None else f"these {own.n:,} examples"
            found.append(f"{own.task}: on {on} this model is {listed(said)}.")
    return tuple(found)


def _groups(facts: CardFacts, others: Sequence[Score]) -> list[tuple[str, str, dict[Score, str]]]:
    """What this model is compared with: words for one of the kind, words for the best of several,
    and the rows that are of it, with the names that sentences give them.
    """
    base = facts.base
    role, own = (base.role, {base.name, f"{base.role} {base.name}"}) if base else ("base", set())
    kind = "source" if facts.fusion is not None else "expert"
    experts = {p.name for p in facts.experts} if kind == "expert" else set()
    pivots: dict[Score, str] = {}
    parents: dict[Score, str] = {}
    tuned: dict[Score, str] = {}
    targets: dict[Score, str] = {}
    uniform: dict[Score, str] = {}
    for row in others:
        name = row.model
        if name in own:
            pivots[row] = name
        elif name in experts or name.startswith("source "):
            parents[row] = name.removeprefix("source ")
        elif name == SFT:
            tuned[row] = name
        elif name.startswith(TARGET):
            targets[row] = name.removeprefix(TARGET)
        elif name.startswith("uniform"):
            uniform[row] = name
    return [
        (f"its {role}", f"its {role}", pivots),
        (f"its {kind}", f"its best {kind}", parents),
        ("plain fine-tuning on the same data", "", tuned),
        ("its single target", "its best single target, that of", targets),
        ("the uniform merge", "the best uniform merge,", uniform),
    ]


def _verdict(own: Score, other: Score, name: str) -> str:
    """`better than ...`, `worse than ...` or what cannot be said, with the distance."""
    gap, error = -_behind(own, other), _error(own, other)
    if not gap:
        return f"as good as {name}"
    if not error:
        return f"{'ahead of' if gap > 0 else 'behind'} {name} (how surely is not known)"
    distance = f"{abs(gap) / error:.1f} standard errors"
    if abs(gap) >= BEYOND_CHANCE * error:
        return f"{'better' if gap > 0 else 'worse'} than {name} ({distance})"
    if gap > 0:
        return f"not better than {name} beyond chance ({distance} ahead)"
    return f"not better than {name} ({distance} behind, which may be chance)"


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
