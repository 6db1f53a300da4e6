"""Merge methods of installed packages, loaded when somebody asks for them.

Any distribution may offer methods in the entry-point group `mergekit.merge_methods`: the name is
the method's name, the value a method, a list of methods, or a function that returns either. A
built-in name never comes here. A plugin that cannot be imported, raises or calls `sys.exit` costs
one warning line, and only when its own name, an unknown name or the whole list is asked for.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterable
from typing import Any

from mergekit_unconstrained import catalog
from mergekit_unconstrained.errors import UnknownMethodError

GROUP = "mergekit.merge_methods"
LOG = logging.getLogger(__name__)

_failures: dict[str, str] = {}
_loaded: set[importlib.metadata.EntryPoint] = set()


@functools.cache
def entry_points() -> tuple[importlib.metadata.EntryPoint, ...]:
    """Every plugin entry point, by distribution name, so that who comes first is not luck."""
    found = importlib.metadata.entry_points(group=GROUP)
    return tuple(sorted(set(found), key=lambda e: (e.dist.name if e.dist else "", e.name)))


def find(name: str, builtin: Callable[[str], Any]) -> Any:
    """The plugin method `name`, registered with mergekit on the way.

    `builtin` is mergekit's own look-up; an unknown name raises UnknownMethodError with the nearest
    names and what failed to load.
    """
    if name.startswith(catalog.ALIAS_PREFIX) and (entry := catalog.entry_for(name)) is not None:
        return _alias(name, entry)
    ours_first = sorted(entry_points(), key=lambda e: e.name != name)
    for entry_point in ours_first:
        if entry_point.name == name:
            _load(entry_point)
    for entry_point in ours_first:
        try:
            return builtin(name)
        except RuntimeError:
            _load(entry_point)
    try:
        return builtin(name)
    except RuntimeError:
        raise unknown(name) from None


def load_all() -> None:
    """Register every plugin method, and say which names stay hidden behind others."""
    for entry_point in entry_points():
        _load(entry_point)


def unknown(name: str) -> UnknownMethodError:
    """The error for a name that nobody offers."""
    from mergekit_unconstrained import compat

    known = sorted({m.spec.name for m in compat.registered()} | set(catalog.CATALOG))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    message = f"Unimplemented merge method {name!r}."
    if near:
        message += f" Did you mean {' or '.join(repr(n) for n in near)}?"
    else:
        message += f" Known methods: {', '.join(known)}."
    if _failures:
        broken = "; ".join(f"{plugin} ({why})" for plugin, why in sorted(_failures.items()))
        message += f" Plugins that could not be loaded: {broken}."
    return UnknownMethodError(message)


def _load(entry_point: importlib.metadata.EntryPoint) -> None:
    from mergekit_unconstrained import compat

    if entry_point in _loaded:
        return
    _loaded.add(entry_point)
    owner = entry_point.dist.name if entry_point.dist else "an unknown package"
    try:
        methods = list(_methods(entry_point.load(), compat.MergeMethod))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may even call sys.exit at import
        _failures[f"{entry_point.name} of {owner}"] = f"{type(error).__name__}: {error}"
        LOG.warning(
            "merge-method plugin %s of %s was not loaded: %s: %s",
            entry_point.name,
            owner,
            type(error).__name__,
            error,
        )
        return
    for method in methods:
        try:
            compat.register(method)
        except ValueError:
            LOG.warning(
                "merge method %s of %s is hidden by another of that name, which came first",
                method.spec.name,
                owner,
            )


def _methods(value: Any, method_type: type) -> Iterable[Any]:
    if isinstance(value, method_type):
        return [value]
    if callable(value):
        return _methods(value(), method_type)
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        methods = list(value)
        for method in methods:
            if not isinstance(method, method_type):
                raise TypeError(f"expected merge methods, found {type(method).__name__}")
        return methods
    raise TypeError(f"expected a merge method, a list or a factory, found {type(value).__name__}")


def _alias(name: str, entry: catalog.CatalogEntry) -> Any:
    from mergekit_unconstrained import compat

    module, _, attribute = entry.target.partition(":")
    method = getattr(importlib.import_module(module), attribute)
    alias = compat.renamed(method, name)
    compat.register(alias)
    return alias
