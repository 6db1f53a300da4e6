"""Merge methods of installed packages, loaded when somebody asks for them.

Any distribution may offer methods in the entry-point group `mergekit.merge_methods`: the name is
the method's name, the value a method, or a list of methods or a function that returns either. A
built-in name never comes here. Where several packages offer one name, ours comes first, then the
entry point that carries the name, then the alphabet of the distributions decides. A plugin that
cannot be imported, raises or calls `sys.exit` costs one warning line, and only when its own name,
an unknown name or the whole list is asked for.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import EntryPoint
from typing import Any

from mergekit_unconstrained import catalog, compat
from mergekit_unconstrained.errors import UnknownMethodError

GROUP = "mergekit.merge_methods"
OURS = "mergekit-unconstrained"
LOG = logging.getLogger(__name__)

failures: dict[str, str] = {}
"""Plugins that could not be loaded so far: "NAME of DISTRIBUTION" -> why."""

_loaded: dict[EntryPoint, list[compat.MergeMethod]] = {}
_lock = threading.RLock()  # re-entrant: a plugin may itself ask for another plugin's method


@functools.cache
def entry_points() -> tuple[EntryPoint, ...]:
    """Every plugin entry point: ours from the catalogue, then the others by distribution."""
    ours = [EntryPoint(entry.name, entry.target, GROUP) for entry in catalog.CATALOG.values()]
    others = set(importlib.metadata.entry_points(group=GROUP)).difference(ours)
    return (*ours, *sorted(others, key=lambda e: (owner_of(e), e.name, e.value)))


def owner_of(entry_point: EntryPoint) -> str:
    """The distribution an entry point belongs to."""
    return str(entry_point.dist.name) if entry_point.dist else OURS


def find(name: str, builtin: Callable[[str], Any]) -> compat.MergeMethod:
    """The plugin method `name`, registered with mergekit on the way.

    `builtin` is mergekit's own look-up; an unknown name raises UnknownMethodError with the nearest
    names and what failed to load.
    """
    with _lock:
        try:
            return builtin(name)  # another thread was faster
        except RuntimeError:
            pass
        for method, owner in _offers(name):
            compat.register(method)
            for other in {owner_of(e) for e in entry_points() if e.name == name} - {owner}:
                _report_hidden(name, other, owner)
            return method
        raise unknown(name) from None


def load_all() -> None:
    """Register every plugin method, and say which stay hidden behind others of their name."""
    with _lock:
        methods = [method for entry_point in entry_points() for method in _methods_of(entry_point)]
        for name in dict.fromkeys(method.spec.name for method in methods):
            (method, winner), *others = _offers(name)
            try:
                compat.register(method)
            except ValueError:
                if compat.get(name) is not method:
                    others.insert(0, (method, winner))
                    winner = "mergekit"
            for _, other in others:
                _report_hidden(name, other, winner)


def unknown(name: str) -> UnknownMethodError:
    """The error for a name that nobody offers, or whose plugin is broken."""
    ours = (*catalog.CATALOG, *(catalog.ALIAS_PREFIX + n for n in catalog.CATALOG))
    names = sorted({m.spec.name for m in compat.registered()}.union(ours))
    known = [n for n in names if _is_alias(n) == _is_alias(name)]
    # Without the prefix of aliases, which would make them all alike.
    prefix = catalog.ALIAS_PREFIX if _is_alias(name) else ""
    bare = [n.removeprefix(prefix) for n in known]
    near = difflib.get_close_matches(name.removeprefix(prefix), bare, n=3, cutoff=0.5)
    near = [prefix + n for n in near]
    message = f"Unimplemented merge method {name!r}."
    if any(name == e.name for e in entry_points()):
        message = f"Merge method {name!r} is installed but does not load."
    elif near:
        message += f" Did you mean {' or '.join(repr(n) for n in near)}?"
    else:
        message += f" Known methods: {', '.join(known)}."
    if failures:
        broken = "; ".join(f"{plugin} ({why})" for plugin, why in sorted(failures.items()))
        message += f" Plugins that could not be loaded: {broken}."
    return UnknownMethodError(message)


def _is_alias(name: str) -> bool:
    return name.startswith(catalog.ALIAS_PREFIX)


def _offers(name: str) -> Iterator[tuple[compat.MergeMethod, str]]:
    """The plugin methods called `name` and their distributions, the one that counts first."""
    ours = catalog.entry_for(name)
    if ours is not None and name != ours.name:
        # Under its own name in the registry, since mergekit looks a method up again by that name.
        for method in _methods_of(EntryPoint(ours.name, ours.target, GROUP)):
            yield compat.renamed(method, name), OURS
        return
    for entry_point in sorted(entry_points(), key=lambda e: e.name != name):
        for method in _methods_of(entry_point):
            if method.spec.name == name:
                yield method, owner_of(entry_point)


def _methods_of(entry_point: EntryPoint) -> list[compat.MergeMethod]:
    """What an entry point offers; nothing, and one warning ever, when it does not load."""
    if entry_point not in _loaded:
        _loaded[entry_point] = []  # what a plugin sees that asks for itself while it is loaded
        try:
            _loaded[entry_point] = list(_unpack(entry_point.load(), entry_point.name))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may even call sys.exit at import
            plugin = f"{entry_point.name} of {owner_of(entry_point)}"
            why = " ".join(f"{type(error).__name__}: {error}".split())
            failures[plugin] = why
            LOG.warning("merge-method plugin %s was not loaded: %s", plugin, why)
    return _loaded[entry_point]


def _unpack(value: Any, name: str) -> Iterable[compat.MergeMethod]:
    if isinstance(value, compat.MergeMethod):
        if value.spec.name != name:
            raise ValueError(f"the method calls itself {value.spec.name!r}, not {name!r}")
        return [value]
    if callable(value):
        return _unpack(value(), name)
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        methods = list(value)
        for method in methods:
            if not isinstance(method, compat.MergeMethod):
                raise TypeError(f"expected merge methods, found {type(method).__name__}")
            method.spec.name  # noqa: B018  (a method without a spec fails here, not in a merge)
        return methods
    raise TypeError(f"expected a merge method, a list or a factory, found {type(value).__name__}")


@functools.cache
def _report_hidden(name: str, loser: str, winner: str) -> None:
    remedy = f"; `{catalog.ALIAS_PREFIX}{name}` always means it" if loser == OURS else ""
    LOG.warning("merge method %s of %s is hidden by the one of %s%s", name, loser, winner, remedy)
