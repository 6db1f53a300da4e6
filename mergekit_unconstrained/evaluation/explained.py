"""Every kind of task with all of its settings, as a tasks file would have them."""

from __future__ import annotations

from mergekit_unconstrained.config.explain import explained
from mergekit_unconstrained.evaluation.kinds import KINDS, kind_class


def kinds_text() -> str:
    """A tasks file with one task of every kind, each setting with its default and explanation."""
    parts = ["tasks:\n"]
    for kind in KINDS:
        found = kind_class(kind)
        told = " ".join((found.__doc__ or "").split())
        parts.append(f"\n  # {told}\n  {kind}:\n")
        parts.append(explained(found.settings_class, "    ", {"kind": kind}))
    return "".join(parts)
