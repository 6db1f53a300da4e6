"""The discovery hook: plugins for mergekit's registry, and our jobs in front of `run_merge`.

torch calls `activate` at the end of `import torch` (entry-point group `torch.backends`), and every
mergekit command imports torch. Three public names of mergekit are wrapped, as soon as their modules
have been executed and not before:

    mergekit.merge_methods.registry.get                 an unknown name asks the plugins
    mergekit.merge_methods.registry.registered_methods  lists the plugins too
    mergekit.merge.run_merge                            unknown methods fail before any download;
                                                        our methods run as jobs (jobs.py)

Rules of this file: standard library only at import time, nothing here may raise into `import torch`
or `import mergekit`, and a name whose signature is not the one we know is left alone, with one
warning. `MERGEKIT_DISABLE_PLUGINS=1` switches everything off.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import logging
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

OFF_SWITCH = "MERGEKIT_DISABLE_PLUGINS"
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
    for name in _PATCHES:
        module = sys.modules.get(name)
        if module is not None:
            _patch_when_ready(module)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def is_active() -> bool:
    """Whether mergekit's `run_merge` is, or will be, ours."""
    module = sys.modules.get("mergekit.merge")
    if module is not None and hasattr(module, "run_merge"):
        return hasattr(module.run_merge, _MARK)
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the ordinary finders find the modules to patch, and patches them once executed."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        loader = spec.loader if spec is not None else None
        if spec is None or loader is None or not hasattr(loader, "exec_module"):
            return None
        execute = loader.exec_module

        def exec_then_patch(module: types.ModuleType) -> None:
            # Shadowing the method on the instance and removing it again leaves the module with
            # its own loader, so inspect, pickle and reload see nothing of us.
            del loader.exec_module
            execute(module)
            _apply(module)

        loader.exec_module = exec_then_patch  # type: ignore[method-assign]
        return spec


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
    if getattr(module.__spec__, "_initializing", False):
        if type(module) is types.ModuleType:
            module.__class__ = _PatchOnFirstUse
    else:
        _apply(module)


def _apply(module: types.ModuleType) -> None:
    """Wrap a module's names; whatever goes wrong becomes one warning."""
    for name, (parameters, wrapper) in _PATCHES[module.__name__].items():
        original = getattr(module, name, None)
        if hasattr(original, _MARK):
            continue
        try:
            found = tuple(inspect.signature(original).parameters)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            found = ()
        if found[: len(parameters)] != parameters or (parameters == () and found):
            _warn(
                f"{module.__name__}.{name} is not what this version knows (it takes "
                f"{', '.join(found) or 'nothing'}), so it is left alone; use "
                "`mergekit-unconstrained yaml` or a newer mergekit-unconstrained"
            )
            continue
        patched = wrapper(original)  # type: ignore[arg-type]
        setattr(patched, _MARK, True)
        setattr(module, name, patched)
        # mergekit.merge_methods re-exports the registry; when we come late it has the old names.
        package = sys.modules.get(module.__name__.rpartition(".")[0])
        if package is not None and getattr(package, name, None) is original:
            setattr(package, name, patched)


def _wrap_get(original: Callable[[str], Any]) -> Callable[[str], Any]:
    @functools.wraps(original)
    def get(name: str) -> Any:
        try:
            return original(name)
        except RuntimeError:
            from mergekit_unconstrained import plugins

            return plugins.find(name, original)

    return get


def _wrap_registered_methods(original: Callable[[], Any]) -> Callable[[], Any]:
    @functools.wraps(original)
    def registered_methods() -> Any:
        from mergekit_unconstrained import plugins

        plugins.load_all()
        return original()

    return registered_methods


def _wrap_run_merge(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def run_merge(
        merge_config: Any, out_path: str, options: Any, config_source: str | None = None
    ) -> Any:
        from mergekit_unconstrained import jobs

        return jobs.run(original, merge_config, out_path, options, config_source)

    return run_merge


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


def _warn(message: str) -> None:
    # Logging, not warnings: under `python -W error` a warning would break `import torch`.
    logging.getLogger("mergekit_unconstrained").warning("mergekit-unconstrained: %s", message)
