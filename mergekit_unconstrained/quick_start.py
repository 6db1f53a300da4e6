"""What our own commands leave out of mergekit's start-up until somebody needs it.

Most of the time in which mergekit starts goes into things that few merges touch:

* `import peft` (mergekit.common), needed to apply adapters. Here the real module runs at the
  first attribute that anybody asks of it.
* the activation functions (transformers.activations), and with them most of transformers and
  torch.compile, against whose names every config's activation is checked. Here that check is made
  only when they are loaded anyway: a merge runs no model.
* a table of transformers' Auto classes (mergekit.common.ARCH_NAME_TO_AUTO_CLS), for which every
  modelling class is imported; needed to apply adapters too. Here it is filled when it is read, by
  the same code of mergekit's.
* `import networkx`, of which mergekit's own executor needs one function, and `import accelerate`,
  which reads pickles: as peft.
* the list of what every file of transformers.models offers, which transformers makes by reading
  them all, twice, since its cache of 128 folders is too small for its 500. Here it reads them once,
  and only the end of each.

Nothing else is put off for good. mergekit-yaml itself is left as it is: what it
imports is none of a plugin's business.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

FUNCTIONS = ("mergekit.architecture.auto", "mergekit.architecture.conversion")
"""Modules of functions that most merges never call (inferred architectures, fused experts)."""
AUTO = "transformers.models.auto.modeling_auto"
COMMON = "mergekit.common"
IMPORTS = "transformers.utils.import_utils"
ACTIVATIONS = "transformers.activations"
VALIDATORS = "transformers.utils.type_validators"


def prepare() -> None:
    """Import mergekit.common without what it can do without; nothing when it is loaded already."""
    if COMMON in sys.modules or AUTO in sys.modules:
        return
    with _reads_its_files_once():
        import transformers

    for package in ("peft", "networkx", "accelerate"):
        defer(package)
    _defer_activations()
    sys.modules[AUTO] = None  # type: ignore[assignment]  # an ImportError, which mergekit expects
    annotates = "PreTrainedModel" not in vars(transformers)
    if annotates:
        transformers.PreTrainedModel = PreTrainedModel
    try:
        common = importlib.import_module(COMMON)
    finally:
        del sys.modules[AUTO]
        if annotates:
            del transformers.PreTrainedModel
    _defer_functions()
    if getattr(common, "ARCH_NAME_TO_AUTO_CLS", None) == {}:
        common.ARCH_NAME_TO_AUTO_CLS = AutoClasses()  # type: ignore[attr-defined]


@contextmanager
def _reads_its_files_once() -> Iterator[None]:
    """While transformers is imported, let its two functions that list its models be quick."""
    finder = _ImportsFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _ImportsFinder(importlib.abc.MetaPathFinder):
    """Changes IMPORTS as soon as it is executed, in the middle of transformers' own import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != IMPORTS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                hasten(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def hasten(imports: ModuleType) -> None:
    """Replace two functions of IMPORTS by equal ones, where they are those we know."""
    names = getattr(imports, "fetch__all__", None)
    cached = getattr(imports, "create_import_structure_from_path", None)
    structure = getattr(cached, "__wrapped__", None)
    if names is None or structure is None:
        return

    def last_names(content: str) -> Any:
        # The last line that begins with __all__ counts, and nothing before it.
        return names(content[content.rfind("\n__all__") + 1 :])

    imports.fetch__all__ = last_names  # type: ignore[attr-defined]
    unlimited = functools.lru_cache(maxsize=None)(structure)
    imports.create_import_structure_from_path = unlimited  # type: ignore[attr-defined]


class Activations(dict[str, Any]):
    """transformers' ACT2FN, empty until somebody else has loaded it."""

    def _real(self) -> dict[str, Any]:
        return getattr(sys.modules.get(ACTIVATIONS), "ACT2FN", {})

    def __len__(self) -> int:
        return len(self._real())

    def __contains__(self, key: object) -> bool:
        return key in self._real()

    def keys(self) -> Any:
        """The names."""
        return self._real().keys()


def _defer_activations() -> None:
    if ACTIVATIONS in sys.modules or VALIDATORS in sys.modules:
        return
    stand_in = ModuleType(ACTIVATIONS)
    stand_in.ACT2FN = Activations()  # type: ignore[attr-defined]
    sys.modules[ACTIVATIONS] = stand_in
    try:
        importlib.import_module(VALIDATORS)
    except ImportError:  # another release of transformers, which checks elsewhere
        pass
    finally:
        del sys.modules[ACTIVATIONS]


class PreTrainedModel:
    """What two annotations of mergekit.common name; the real class imports all of modelling."""


class Deferred(ModuleType):
    """A module that runs when the first attribute is asked of it that only its own code can have.

    importlib's LazyLoader would not do: asking whether a package is there, as transformers does,
    is enough for it to load the package.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with _LOCK:
            if type(self) is Deferred:
                self.__class__ = ModuleType  # type: ignore[assignment]
                spec = self.__spec__
                assert spec is not None
                assert spec.loader is not None
                self.__path__ = spec.submodule_search_locations or []
                spec.loader.exec_module(self)
        return getattr(self, name)


_LOCK = threading.RLock()


def defer(name: str) -> None:
    """Let a package run when it is first used; one that is not installed stays as it is."""
    spec = importlib.util.find_spec(name) if name not in sys.modules else None
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = Deferred
    # Without its path, an import of one of its parts runs the package first, as it should.
    vars(module).pop("__path__", None)
    sys.modules[name] = module


class Forwarding(ModuleType):
    """Stands in for a module of functions while others import them: its functions call the real."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

        def call(*arguments: Any, **named: Any) -> Any:
            return getattr(importlib.import_module(self.__name__), name)(*arguments, **named)

        call.__name__ = call.__qualname__ = name
        call.__module__ = self.__name__
        return call


def _defer_functions() -> None:
    """Import what uses FUNCTIONS with stand-ins for them, which are gone afterwards."""
    stand_ins = {name: Forwarding(name) for name in FUNCTIONS if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        importlib.import_module("mergekit.architecture")
        importlib.import_module("mergekit.io.tasks")
    finally:
        for name in stand_ins:
            del sys.modules[name]


class AutoClasses(dict[str, Any]):
    """mergekit's table of Auto classes by architecture, which fills itself when it is read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_filled = False

    def _fill(self) -> None:
        with self._lock:
            if not self._is_filled:
                super().update(_whole_common().ARCH_NAME_TO_AUTO_CLS)
                self._is_filled = True

    def __contains__(self, key: object) -> bool:
        self._fill()
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self._fill()
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        self._fill()
        return super().__iter__()

    def __len__(self) -> int:
        self._fill()
        return super().__len__()

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict."""
        self._fill()
        return super().get(key, default)

    def keys(self) -> Any:
        """As of a dict."""
        self._fill()
        return super().keys()

    def items(self) -> Any:
        """As of a dict."""
        self._fill()
        return super().items()

    def values(self) -> Any:
        """As of a dict."""
        self._fill()
        return super().values()


def _whole_common() -> ModuleType:
    """mergekit.common executed a second time, under no name, with all that it imports."""
    spec = importlib.util.find_spec(COMMON)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Pydantic and dataclasses look their module up while its classes are made.
    module.__name__ = spec.name
    spec.loader.exec_module(module)
    return module
