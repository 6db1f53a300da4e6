"""The licence of a result, folded from those of its parents, teachers and data. Not legal advice.

The fold looks at the set of the licences alone, so the order and the number of the parents do not
matter, and one more of them never makes the verdict milder:

    refused    a parent's licence forbids to share what is derived from it
    conflict   two licences demand what cannot be done at once, or outputs may not be learned from
    review     something is not known, or no single licence says all that must be said
    clear      one licence of the Hub's list demands all that every other one demands
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass, replace
from typing import Literal

from mergekit_unconstrained.hub.licence_rules import RULES, WITHOUT_RULE, Rule

__all__ = [
    "NOT_LEGAL_ADVICE",
    "RULES",
    "STATUSES",
    "WITHOUT_RULE",
    "Status",
    "Verdict",
    "distillation",
    "is_known",
    "kept_private",
    "named",
    "told",
    "verdict",
]

Status = Literal["clear", "review", "conflict", "refused"]
STATUSES: tuple[Status, ...] = ("clear", "review", "conflict", "refused")
"""From the mildest to the strictest."""
NOT_LEGAL_ADVICE = (
    "This was folded by a table of rules from what the models' cards declare; it is not legal "
    "advice."
)
Named = tuple[str, str | None]
"""What a model or data set is called, and the Hub's short name of its licence, None if unknown."""


@dataclass(frozen=True)
class Verdict:
    """What may be said of a result's licence.

    effective: the Hub's short name, or `other`; always that where the result is refused or its
    terms conflict, as no licence can then be given. name: for people, and the Hub's `license_name`
    where effective is `other`. link: the text; None where there is no single one. duties: of
    whoever publishes the result. reasons: why the status is not `clear`. grounds: why it is this
    licence. beginnings: what the result's name has to begin with, and the licence that asks for it.
    """

    effective: str
    name: str
    link: str | None
    status: Status
    duties: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    grounds: tuple[str, ...] = ()
    beginnings: tuple[tuple[str, str], ...] = ()

    @property
    def may_be_public(self) -> bool:
        """Whether nobody has to look before it is published."""
        return self.status == "clear"


def verdict(
    parents: Iterable[Named], teachers: Iterable[Named] = (), datasets: Iterable[Named] = ()
) -> Verdict:
    """Fold the licences of merged models, of teachers in a distillation and of training data.

    parents must not be empty. Names only appear in sentences.
    """
    fold = _Fold(_unique(parents))
    for name, licence in _unique(teachers):
        fold.teacher(name, licence)
    for name, licence in _unique(datasets):
        fold.data(name, licence)
    return fold.verdict()


def named(found: Verdict, name: str) -> Verdict:
    """A verdict for a result of this name: one that breaks a duty to be named needs a look.

    Case, spaces and punctuation do not count, as the Hub's names have no spaces.
    """
    broken = tuple(
        f'The name {name!r} does not begin with "{beginning}", as {licence} asks: choose another '
        "name to publish it under."
        for beginning, licence in found.beginnings
        if not _letters(name).startswith(_letters(beginning))
    )
    if not broken:
        return found
    status = max(found.status, "review", key=STATUSES.index)
    return replace(found, status=status, reasons=tuple(sorted((*found.reasons, *broken))))


def kept_private(found: Verdict) -> str | None:
    """One line for a terminal where a result is not to be given away as it is, else None."""
    until = {"refused": "", "conflict": " until somebody has checked the licences"}
    if found.status not in until:
        return None
    why = " ".join(found.reasons)
    return f"private only{until[found.status]} ({found.status}): {why} (Not legal advice.)"


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()


def told(found: Verdict) -> tuple[str, ...]:
    """Lines for a terminal: the licence, why it needs a look, what is to be done."""
    licence = found.name if found.effective == "other" else f"{found.name} ({found.effective})"
    return (
        f"licence of the result: {licence}; status: {found.status}",
        *(f"- {ground}" for ground in found.grounds),
        *(f"- {reason}" for reason in found.reasons),
        *(f"- duty: {duty}" for duty in found.duties),
        NOT_LEGAL_ADVICE,
    )


def is_known(licence: str | None) -> bool:
    """Whether there is a rule for a licence, as a card declares it."""
    return _rule(licence) is not None


def distillation(model: str, licence: str | None) -> str | None:
    """A sentence of warning for a teacher's licence, None where none is known to be needed."""
    rule = _rule(licence)
    return _LEARNING[rule.outputs].format(model=model, name=rule.name) or None if rule else None


_LEARNING = {
    "free": "",
    "unclear": (
        "Whether {name}, the licence of {model}, permits this use: what it says of a model that "
        "learned from outputs is not clear."
    ),
    "derivative": (
        "{name}, the licence of {model}, counts models trained on its outputs as derivatives to "
        "which its terms apply."
    ),
    "named": (
        "{name}, the licence of {model}, asks that the name of a model trained on its outputs "
        "begins with Llama."
    ),
    "forbidden": (
        "{name}, the licence of {model}, forbids using the model or its outputs to improve other "
        "language models."
    ),
}


class _Fold:
    """binding: the rules that the result stands under, parents' and those that follow outputs."""

    def __init__(self, parents: list[Named]) -> None:
        if not parents:
            raise ValueError("a model without parents has no licence to fold")
        self.binding: set[Rule] = set()
        self.unknown = False
        self.status: Status = "clear"
        self.reasons: set[str] = set()
        self.duties: set[str] = set()
        self.following: set[str] = set()
        self.beginnings: set[tuple[str, str]] = set()
        self.parents = {_normal(licence) for _, licence in parents}
        for name, licence in parents:
            self._parent(name, licence)

    def teacher(self, name: str, licence: str | None) -> None:
        rule = _rule(licence)
        if rule is None:
            self._raise(
                "review", f"The licence of the teacher {name} is not known{_said(licence)}."
            )
            return
        reason = _LEARNING[rule.outputs].format(model=name, name=rule.name)
        if rule.outputs == "derivative":
            self.binding.add(rule)
            self.following.add(reason)
        elif rule.outputs == "named":  # its other duties hold "also"
            self._raise("review", reason)
            self.duties |= set(rule.all_duties)
            self.beginnings.add((rule.beginning, rule.name))
            self.following.add(
                f"{rule.name}, the licence of {name}, puts duties on a model trained on its "
                "outputs, but does not say that it stands under this licence."
            )
        elif rule.outputs == "unclear":
            strict = rule.family == "no derivatives"
            self._raise("conflict" if strict else "review", reason)
        elif rule.outputs == "forbidden" and self.parents != {rule.id}:
            self._raise("conflict", reason)

    def data(self, name: str, licence: str | None) -> None:
        rule = _rule(licence)
        if rule is None:
            self._raise("review", f"The licence of the data {name} is not known{_said(licence)}.")
        elif rule.family == "vendor":  # outputs of that vendor's model
            self.teacher(name, licence)
        elif rule.family == "permissive":
            self.duties.add(f"Credit the data set {name} ({rule.name}).")
        elif rule.family != "public domain":
            self._raise(
                "review",
                f"Whether a model trained on {name} stands under {rule.name} is not settled.",
            )

    def verdict(self) -> Verdict:
        chosen = _covering(self.binding)
        if chosen is None and self.binding:
            self._why_none()
        given = chosen if self.status in ("clear", "review") and not self.unknown else None
        under = self.binding | ({chosen} if chosen is not None else set())
        duties = self.duties | {duty for rule in under for duty in rule.all_duties}
        grounds = (*sorted(self.following), *self._why(given))
        beginnings = self.beginnings | {(r.beginning, r.name) for r in under if r.beginning}
        done = (
            self.status,
            tuple(sorted(duties)),
            tuple(sorted(self.reasons)),
            grounds,
            tuple(sorted(beginnings)),
        )
        if given is not None:
            return Verdict(given.id, given.name, given.link, *done)
        return Verdict("other", self._name(chosen), None, *done)

    def _name(self, chosen: Rule | None) -> str:
        """For the terms where no licence can be named. chosen: it could, were there no conflict."""
        if self.status == "refused":
            return "not-to-be-shared"
        if self.status == "conflict" and chosen is not None and not self.unknown:
            return "conflicting-terms"
        names = sorted(rule.id for rule in self.binding if rule.demands)
        return "-and-".join([*names, *(["unknown"] if self.unknown else [])])

    def _parent(self, name: str, licence: str | None) -> None:
        rule = _rule(licence)
        if rule is None:
            self.unknown = True
            self._raise("review", f"The licence of {name} is not known{_said(licence)}.")
        elif rule.family == "no derivatives":
            self.binding.add(rule)
            self._raise("refused", f"{name} is under {rule.name}, which allows no derivatives.")
        else:
            self.binding.add(rule)

    def _raise(self, status: Status, reason: str) -> None:
        self.status = max(self.status, status, key=STATUSES.index)
        self.reasons.add(reason)

    def _why(self, chosen: Rule | None) -> tuple[str, ...]:
        """Why the result stands under this licence rather than another one's."""
        if chosen is None:
            return ()
        others = sorted(rule.name for rule in self.binding if rule != chosen)
        if not others:
            return (f"Every model whose terms bind this one is under {chosen.name}.",)
        said = f"{chosen.name} governs since it demands whatever {_listed(others)} "
        said += "demands" if len(others) == 1 else "demand"
        if chosen not in self.binding:
            said += ", and is the licence that they name for what is made from both"
        return (f"{said}; the duties of every one are below.",)

    def _why_none(self) -> None:
        rules = sorted(self.binding, key=lambda rule: rule.id)
        for index, one in enumerate(rules):
            for two in rules[index + 1 :]:
                if _covering({one, two}) is not None:
                    continue
                what = f"{one.name} and {two.name}"
                if "same terms" in one.demands | two.demands:
                    self._raise("conflict", f"{what} cannot both be kept by one work.")
                else:
                    self._raise("review", f"No single licence says what {what} demand.")
        self._raise("review", "No licence of the Hub's list covers all the parents' terms.")


def _covering(rules: Set[Rule]) -> Rule | None:
    """The licence that demands what every one of these does, rather one of them; of several the
    most explicit."""
    named = {RULES[other] for rule in rules for other in rule.compatible if other in RULES}
    able = [a for a in rules | named if all(_covers(a, b) for b in rules)]

    def explicit(rule: Rule) -> tuple[bool, int, str]:
        return rule in rules, len(rule.all_duties), rule.id

    return max(able, key=explicit, default=None)


def _covers(a: Rule, b: Rule) -> bool:
    """Whether a result under `a` keeps all that `b` demands."""
    if a == b:
        return True
    if b.id in a.against or not b.demands <= a.demands:
        return False
    if b.family in ("vendor", "research only", "use restrictions"):
        return False  # their own texts have to be passed on, and no other one says the same
    return "same terms" not in b.demands or a.id in b.compatible


def _normal(licence: str | None) -> str | None:
    return licence.strip().lower() if licence else None


def _rule(licence: str | None) -> Rule | None:
    return RULES.get(_normal(licence) or "")


def _said(licence: str | None) -> str:
    return f" (declared as {licence!r})" if licence else ""


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _unique(models: Iterable[Named]) -> list[Named]:
    return list(dict.fromkeys(models))
