"""The hook itself, mostly on a stand-in for mergekit, so that every way of importing is cheap."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import pickle
import socket
import subprocess
import sys
import textwrap
import threading
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mergekit_unconstrained import _activate

FAKE = {
    "fakekit/__init__.py": "",
    "fakekit/merge.py": """
        def run_merge(merge_config, out_path, options, config_source=None):
            "The original."
            return "original"
        """,
    "fakekit/script.py": "from fakekit.merge import run_merge",
    "fakekit/other.py": "value = 1",
}


@pytest.fixture
def fakekit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Write a package `fakekit`, to be patched in mergekit's place, and put it on the path.

    Keyword arguments replace the source of its modules, `archive=True` zips it.
    """

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def run_merge(merge_config, out_path, options, config_source=None):
            return "patched " + original(merge_config, out_path, options, config_source)

        run_merge.__module__, run_merge.__qualname__ = original.__module__, original.__qualname__
        return run_merge

    known = ("merge_config", "out_path", "options", "config_source")
    monkeypatch.setattr(_activate, "_PATCHES", {"fakekit.merge": {"run_merge": (known, wrap)}})
    # torch may have been imported by now, and the real hook with it: out of the way.
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if f not in finders()])
    monkeypatch.delenv(_activate.OFF_SWITCH, raising=False)
    _activate._warn.cache_clear()

    def write(archive: bool = False, **sources: str) -> Path:
        files = FAKE | {f"fakekit/{name}.py": source for name, source in sources.items()}
        folder = tmp_path / "fakekit.zip" if archive else tmp_path
        if archive:
            with zipfile.ZipFile(folder, "w") as file:
                for name, source in files.items():
                    file.writestr(name, textwrap.dedent(source))
        else:
            for name, source in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(folder)
        return folder

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "fakekit"]:
        del sys.modules[name]


def call(module: Any) -> str:
    return module.run_merge(None, "out", None)


def finders() -> list[Any]:
    return [finder for finder in sys.meta_path if isinstance(finder, _activate._Finder)]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "mergekit_unconstrained"]


# -- ways of importing ----------------------------------------------------------------------------


def test_a_module_imported_after_the_hook_is_patched(fakekit):
    fakekit()
    _activate.activate()
    assert call(importlib.import_module("fakekit.merge")) == "patched original"
    assert call(importlib.import_module("fakekit.script")) == "patched original"


def test_a_module_imported_before_the_hook_is_patched_wherever_its_name_was_imported(fakekit):
    fakekit()
    script = importlib.import_module("fakekit.script")
    assert call(script) == "original"
    _activate.activate()
    assert call(script) == call(sys.modules["fakekit.merge"]) == "patched original"


HALF = """
    from mergekit_unconstrained import _activate
    _activate.activate()  # as `import torch` does in the midst of mergekit.merge
    import fakekit.reader  # an import cycle: reads names while they are not all there

    def run_merge(merge_config, out_path, options, config_source=None):
        return "original"
    """


def test_a_half_loaded_module_is_patched_at_its_first_use_and_not_earlier(fakekit):
    fakekit(
        merge=HALF,
        reader="import fakekit.merge as m; early = m._activate, hasattr(m, 'run_merge')",
    )
    from fakekit.merge import run_merge

    assert run_merge(None, "out", None) == "patched original"
    assert sys.modules["fakekit.reader"].early == (_activate, False)
    assert type(sys.modules["fakekit.merge"]) is types.ModuleType


def test_a_half_loaded_module_that_fails_can_be_imported_again(fakekit):
    folder = fakekit(merge=HALF + "\n    raise OSError('half')", reader="")
    with pytest.raises(OSError, match="half"):
        importlib.import_module("fakekit.merge")
    (folder / "fakekit/merge.py").write_text(textwrap.dedent(HALF) + "\n# of another size\n")
    importlib.invalidate_caches()
    assert call(importlib.import_module("fakekit.merge")) == "patched original"


def test_reload_patches_again_and_once(fakekit):
    fakekit()
    _activate.activate()
    module = importlib.import_module("fakekit.merge")
    for _ in range(2):
        module = importlib.reload(module)
        assert call(module) == "patched original"


def test_the_hook_is_installed_once_however_often_it_is_asked(fakekit):
    fakekit()
    for _ in range(3):
        _activate.activate()
        module = importlib.import_module("fakekit.merge")
    assert len(finders()) == 1
    assert call(module) == "patched original"


def test_threads_that_import_at_once_all_see_the_patched_name(fakekit):
    fakekit(merge="import time; time.sleep(0.05)\n" + textwrap.dedent(FAKE["fakekit/merge.py"]))
    _activate.activate()
    start, seen = threading.Barrier(4), []

    def work() -> None:
        start.wait()
        from fakekit.merge import run_merge

        seen.append(run_merge(None, "out", None))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["patched original"] * 4


def test_a_patched_module_keeps_its_own_loader_source_and_pickles(fakekit):
    fakekit()
    _activate.activate()
    module = importlib.import_module("fakekit.merge")
    assert type(module.__loader__) is importlib.machinery.SourceFileLoader
    assert module.__spec__.loader is module.__loader__
    assert "return" in inspect.getsource(module)
    assert pickle.loads(pickle.dumps(module.run_merge)) is module.run_merge


def test_a_spec_that_is_only_looked_at_still_answers_for_its_loader(fakekit):
    fakekit()
    _activate.activate()
    importlib.import_module("fakekit")
    spec = importlib.util.find_spec("fakekit.merge")
    assert "The original" in spec.loader.get_source("fakekit.merge")  # as runpy and pdb do
    assert spec.loader.get_code("fakekit.merge") is not None


def test_the_modules_of_a_zip_archive_share_a_loader_and_only_the_right_one_is_patched(fakekit):
    fakekit(archive=True)
    _activate.activate()
    importlib.import_module("fakekit")
    for _ in range(2):
        assert importlib.util.find_spec("fakekit.merge") is not None
    other = importlib.import_module("fakekit.other")
    module = importlib.import_module("fakekit.merge")
    assert call(module) == "patched original"
    assert type(other.__loader__) is type(module.__loader__)
    assert type(module.__loader__).__name__ == "zipimporter"
    assert "exec_module" not in vars(module.__loader__)


def test_other_finders_keep_their_turn_behind_the_hook(fakekit):
    fakekit()

    class Special(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname, path, target=None):
            spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
            if fullname == "fakekit.merge":
                spec.origin = "special"
            return spec

    sys.meta_path.insert(0, Special())
    _activate.activate()
    module = importlib.import_module("fakekit.merge")
    assert module.__spec__.origin == "special"
    assert call(module) == "patched original"


# -- what must never happen -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "def run_merge(merge_config, out_path, options): return 'original'",
        "def run_merge(config, path, opts, source=None): return 'original'",
        "def run_merge(merge_config, out_path, options, config_source=None, more=1): ...",
        "run_merge = 'not a function'",
        "",
    ],
    ids=["fewer", "renamed", "more", "no function", "gone"],
)
def test_a_name_that_is_not_what_we_know_is_left_alone_with_one_warning(fakekit, caplog, source):
    fakekit(merge=source, script="")
    _activate.activate()
    module = importlib.import_module("fakekit.merge")
    importlib.reload(module)
    _activate.activate()
    assert not hasattr(getattr(module, "run_merge", None), _activate._MARK)
    assert len(warnings_of(caplog)) == 1
    assert "mergekit-unconstrained yaml" in warnings_of(caplog)[0]


def test_activate_never_raises(fakekit, caplog, monkeypatch):
    fakekit()
    monkeypatch.setattr(_activate, "_Finder", None)
    _activate.activate()
    assert "plugin discovery is off" in warnings_of(caplog)[0]


@pytest.mark.parametrize(("value", "off"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_the_off_switch(fakekit, monkeypatch, value, off):
    fakekit()
    monkeypatch.setenv(_activate.OFF_SWITCH, value)
    _activate.activate()
    assert _activate.disabled() is off
    assert bool(finders()) is not off
    expected = "original" if off else "patched original"
    assert call(importlib.import_module("fakekit.merge")) == expected


# -- the real mergekit ----------------------------------------------------------------------------


def python(code: str, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        env={k: v for k, v in os.environ.items() if k != _activate.OFF_SWITCH} | env,
        capture_output=True,
        text=True,
        check=False,
    )


ONLY_THE_HOOK = "['mergekit_unconstrained', 'mergekit_unconstrained._activate']\n"


def test_torch_imports_without_mergekit_in_isolated_mode_with_warnings_as_errors():
    result = python(
        """
        import sys
        sys.modules["mergekit"] = None  # what a missing package looks like
        import torch
        print(sorted(name for name in sys.modules if name.startswith("mergekit_unconstrained")))
        """,
        "-I",
        "-W",
        "error",
    )
    assert result.stderr == ""
    assert result.stdout == ONLY_THE_HOOK
    assert result.returncode == 0


def test_a_stock_merge_costs_no_import_of_ours_although_mergekit_came_before_torch(
    tiny_models, tmp_path
):
    result = python(
        f"""
        import sys
        import warnings

        warnings.simplefilter("ignore")
        from mergekit.merge import run_merge  # torch is imported half-way through mergekit.merge

        from mergekit.config import MergeConfiguration
        from mergekit.merge_methods import get, registry
        from mergekit.options import MergeOptions

        assert "__mergekit_unconstrained__" in vars(run_merge)
        assert "__mergekit_unconstrained__" in vars(get) and get is registry.get
        assert get("ties").spec.name == "ties"
        models = {[str(path) for path in tiny_models.experts[:2]]!r}
        run_merge(
            MergeConfiguration(
                merge_method="linear",
                models=[{{"model": m, "parameters": {{"weight": 0.5}}}} for m in models],
            ),
            {str(tmp_path / "out")!r},
            MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False),
        )
        print(sorted(name for name in sys.modules if name.startswith("mergekit_unconstrained")))
        assert get("layerwise").spec.name == "layerwise"
        """
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ONLY_THE_HOOK
    assert (tmp_path / "out" / "model.safetensors").exists()


def merge_config(method: str, *models: str) -> Any:
    from mergekit_unconstrained.compat import MergeConfiguration

    return MergeConfiguration.model_validate(
        {
            "merge_method": method,
            "models": [{"model": m, "parameters": {"weight": 0.5}} for m in models],
        }
    )


class NoNetworkError(BaseException):
    """Not an OSError, which huggingface_hub would retry five times."""


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What somebody tried to connect to; nobody gets through."""
    import huggingface_hub.constants

    attempts: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        attempts.append(args)
        raise NoNetworkError

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


def test_an_unknown_method_is_refused_before_any_download(connections, tmp_path):
    import mergekit.merge

    from mergekit_unconstrained.compat import MergeOptions
    from mergekit_unconstrained.errors import UnknownMethodError

    models = ("an-organisation/a-model", "an-organisation/another-model")
    options = MergeOptions(quiet=True)
    with pytest.raises(UnknownMethodError, match="Did you mean 'layerwise'"):
        mergekit.merge.run_merge(merge_config("layerwize", *models), str(tmp_path / "o"), options)
    assert connections == []
    # The same call with a known method does try, so the list above is not empty by accident.
    with pytest.raises(NoNetworkError):
        mergekit.merge.run_merge(merge_config("linear", *models), str(tmp_path / "o"), options)
    assert connections != []
    assert not (tmp_path / "o").exists()


def test_a_registry_that_could_not_be_patched_leaves_stock_merges_alone(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "mergekit.merge_methods.registry", types.ModuleType("registry")
    )
    run = _activate._wrap_run_merge(lambda *args: args)
    assert run("config", "out", "options") == ("config", "out", "options", None)


def test_a_mergekit_too_new_for_the_plugin_loader_keeps_its_own_error(monkeypatch, caplog):
    _activate._warn.cache_clear()
    monkeypatch.setitem(sys.modules, "mergekit_unconstrained.plugins", None)
    monkeypatch.delattr("mergekit_unconstrained.plugins", raising=False)

    def original(name: str) -> Any:
        raise RuntimeError(f"Unimplemented merge method {name}")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="Unimplemented merge method nonsense"):
            _activate._wrap_get(original)("nonsense")
    assert _activate._wrap_registered_methods(lambda: ("a",))() == ("a",)
    assert len(warnings_of(caplog)) == 1
