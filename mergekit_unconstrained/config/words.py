"""The nearest right word: what an error says after naming the wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(word: object, known: Iterable[str]) -> str:
    """A sentence that names the nearest known word, or all of them when none is near."""
    options = sorted(set(known))
    near = difflib.get_close_matches(str(word), options, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"Known here: {', '.join(options)}." if options else "Nothing is known here."
