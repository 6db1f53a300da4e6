"""The nearest right word: what an error says after naming the wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(word: object, known: Iterable[str]) -> str:
    """A sentence that names the nearest known words, or all of them when none is near."""
    options = sorted(set(known))
    near = difflib.get_close_matches(str(word), options, n=2, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}?"
    return f"Known here: {', '.join(options)}." if options else "It takes none here."
