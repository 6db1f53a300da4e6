"""The discovery hook: plugins for mergekit's registry, and our jobs in front of `run_merge`.

torch calls `activate` at the end of `import torch` (entry-point group `torch.backends`), and every
mergekit command imports torch. Three public names of mergekit are wrapped, as soon as their modules
have been executed and not before:

    mergekit.merge_methods.registry.get                 an unknown name asks the plugins
    mergekit.merge_methods.registry.registered_methods  lists the plugins too
    mergekit.merge.run_merge                            unknown methods fail before any download;
                                                        methods of plugins, ours among them, run
                                                        as jobs (jobs.py)

Rules of this file: standard library only at import time, nothing here may raise into `import torch`
or `import mergekit`, and a name whose signature is not the one we know is left alone, with one
warning. `MERGEKIT_DISABLE_PLUGINS=1` switches everything off.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import logging
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

OFF_SWITCH = "MERGEKIT_DISABLE_PLUGINS"
FAST_SWITCH = "MERGEKIT_UNCONSTRAINED_FAST"  # our kernels for mergekit's own methods (jobs/fast.py)
_MARK = "__mergekit_unconstrained__"


def disabled() -> bool:
    """Whether the user switched plugins off."""
    return os.environ.get(OFF_SWITCH, "") not in ("", "0")


def activate() -> None:
    """Install the hook; idempotent, and never raises (it runs inside `import torch`)."""
    if not disabled():
        try:
            install()
        except Exception as error:
            _warn(f"plugin discovery is off: {error!r}")


def install() -> None:
    """Patch what is loaded, and wait for what is not. Our own command calls this directly."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in _PATCHES:
        module = sys.modules.get(name)
        if module is not None:
            _patch_when_ready(module)


def is_active() -> bool:
    """Whether mergekit's `run_merge` is, or will be, ours."""
    module = sys.modules.get("mergekit.merge")
    if module is not None and hasattr(module, "run_merge"):
        return hasattr(module.run_merge, _MARK)
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the finders behind it find the modules to patch, and patches them once executed."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _PATCHES or self not in sys.meta_path:
            return None
        # Only those behind us: another finder that also asks its neighbours cannot ask us back.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _PatchingLoader(spec.loader)
                return spec
        return None


class _PatchingLoader(importlib.abc.Loader):
    """Stands in for a module's loader until the module is executed, then takes itself out.

    It wraps rather than alters the loader, which a zip archive's modules share, and leaves the
    module with its own: inspect, pickle and reload see nothing of us.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _apply(module)


class _PatchOnFirstUse(types.ModuleType):
    """Stands in for the class of a module that torch interrupted half-way through its body."""

    def __getattribute__(self, name: str) -> Any:
        get = super().__getattribute__
        if not getattr(get("__spec__"), "_initializing", False):
            self.__class__ = types.ModuleType  # type: ignore[assignment]
            _apply(self)
            return getattr(self, name)
        return get(name)


def _patch_when_ready(module: types.ModuleType) -> None:
    if getattr(getattr(module, "__spec__", None), "_initializing", False):
        if type(module) is types.ModuleType:
            module.__class__ = _PatchOnFirstUse
    else:
        _apply(module)


def _apply(module: types.ModuleType) -> None:
    """Wrap a module's names; one that is not what we know is left alone, with one warning."""
    for name, (parameters, wrap) in _PATCHES.get(module.__name__, {}).items():
        original: Any = getattr(module, name, None)
        if hasattr(original, _MARK):
            continue
        try:
            found = tuple(inspect.signature(original).parameters)
        except Exception:
            found = ("?",)
        if found != parameters:
            _warn(
                f"{module.__name__}.{name}({', '.join(found)}) of this mergekit is not the one "
                f"this version knows ({', '.join(parameters)}), so it is left alone: use "
                "`mergekit-unconstrained yaml`, or a newer mergekit-unconstrained"
            )
            continue
        patched = wrap(original)
        setattr(patched, _MARK, True)
        # The module itself, and whoever imported the name from it before we came.
        for other in [module, *_siblings(module)]:
            if vars(other).get(name) is original:
                setattr(other, name, patched)


def _siblings(module: types.ModuleType) -> list[types.ModuleType]:
    """The loaded modules of the same top-level package."""
    package = module.__name__.partition(".")[0]
    return [
        other
        for name, other in list(sys.modules.items())
        if name.partition(".")[0] == package and isinstance(other, types.ModuleType)
    ]


def _plugins() -> types.ModuleType | None:
    """The module that loads plugins; None, with one warning, where mergekit is too different."""
    try:
        from mergekit_unconstrained import plugins
    except Exception as error:
        _warn(f"merge-method plugins are off: {error!r}")
        return None
    return plugins


def _wrap_get(original: Callable[[str], Any]) -> Callable[[str], Any]:
    @functools.wraps(original)
    def get(name: str) -> Any:
        try:
            return original(name)
        except RuntimeError:
            plugins = _plugins()
            if plugins is None:
                raise
        return plugins.find(name, original)

    return get


def _wrap_registered_methods(original: Callable[[], Any]) -> Callable[[], Any]:
    @functools.wraps(original)
    def registered_methods() -> Any:
        if (plugins := _plugins()) is not None:
            plugins.load_all()
        return original()

    return registered_methods


def _wrap_run_merge(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def run_merge(
        merge_config: Any, out_path: str, options: Any, config_source: str | None = None
    ) -> Any:
        get: Any = getattr(sys.modules.get("mergekit.merge_methods.registry"), "get", None)
        # mergekit itself looks the method up after it has downloaded every model.
        asked = os.environ.get(FAST_SWITCH, "") not in ("", "0")
        if not hasattr(get, _MARK) or (_is_builtin(get(merge_config.merge_method)) and not asked):
            return original(merge_config, out_path, options, config_source)
        from mergekit_unconstrained import jobs

        return jobs.run(original, merge_config, out_path, options, config_source)

    return run_merge


def _is_builtin(method: Any) -> bool:
    """Whether a method is mergekit's own: its kernel, or else its class, is defined there."""
    home = getattr(method, "implementation", type(method)).__module__
    return str(home).partition(".")[0] == "mergekit"


_PATCHES: dict[str, dict[str, tuple[tuple[str, ...], Callable[..., Any]]]] = {
    "mergekit.merge_methods.registry": {
        "get": (("name",), _wrap_get),
        "registered_methods": ((), _wrap_registered_methods),
    },
    "mergekit.merge": {
        "run_merge": (
            ("merge_config", "out_path", "options", "config_source"),
            _wrap_run_merge,
        ),
    },
}


@functools.cache
def _warn(message: str) -> None:
    # Logging, not warnings: under `python -W error` a warning would break `import torch`.
    logging.getLogger("mergekit_unconstrained").warning("mergekit-unconstrained: %s", message)
