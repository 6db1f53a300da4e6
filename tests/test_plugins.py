"""Merge methods of other packages, as entry points of real (if tiny) distributions."""

from __future__ import annotations

import importlib
import logging
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mergekit_unconstrained import catalog, compat, errors, plugins

METHODS = """
    import torch
    from mergekit.merge_methods import TensorGroup, merge_method

    def make(name):
        @merge_method(name=name)
        def kernel(group: TensorGroup) -> torch.Tensor:
            return group.tensors[0]

        return kernel
    """


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """`install("dist-name", "entry = module:object", module="source")` on a registry of its own.

    Every module begins with a function `make(name)` that makes a merge method.
    """
    from mergekit.merge_methods import registry

    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    for name in (*catalog.CATALOG, *(catalog.ALIAS_PREFIX + n for n in catalog.CATALOG)):
        registry._METHODS.pop(name, None)
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.setattr(plugins, "failures", {})
    plugins.entry_points.cache_clear()
    plugins._report_hidden.cache_clear()
    modules = set(sys.modules)

    def write(distribution: str, *entry_points: str, **sources: str) -> None:
        folder = tmp_path / distribution
        info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1\n")
        (info / "entry_points.txt").write_text("\n".join([f"[{plugins.GROUP}]", *entry_points, ""]))
        for name, source in sources.items():
            (folder / f"{name}.py").write_text(
                textwrap.dedent(METHODS) + textwrap.dedent(source) + "\n"
            )
        monkeypatch.syspath_prepend(folder)
        plugins.entry_points.cache_clear()

    yield write
    plugins.entry_points.cache_clear()
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def names() -> list[str]:
    return [method.spec.name for method in compat.registered()]


# -- what a plugin may be -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "value = make('theirs')",
        "value = [make('theirs'), make('more')]",
        "def value(): return make('theirs')",
        "def value(): return [make('theirs')]",
        "def value(): yield make('theirs')",
    ],
    ids=["a method", "a list", "a factory", "a factory of a list", "a generator"],
)
def test_an_entry_point_is_a_method_a_list_or_a_factory(install, caplog, source):
    install("their-package", "theirs = theirs_module:value", theirs_module=source)
    assert compat.get("theirs").spec.name == "theirs"
    assert "theirs" in names()
    assert warnings_of(caplog) == []


def test_a_method_of_a_list_is_found_under_its_own_name(install):
    install("kit", "bundle = kit_module:value", kit_module="value = [make('one'), make('two')]")
    assert compat.get("two").spec.name == "two"
    assert {"one", "two"} <= set(names())


def test_a_plugin_may_register_its_method_itself_as_well(install, caplog):
    source = """
        from mergekit.merge_methods import register
        value = make('theirs')
        register(value)
        """
    install("their-package", "theirs = theirs_module:value", theirs_module=source)
    assert "theirs" in names()
    assert warnings_of(caplog) == []


def test_a_plugin_may_ask_for_the_methods_of_others_while_it_is_loaded(install, caplog):
    source = """
        from mergekit.merge_methods import get, registered_methods
        before = [m.spec.name for m in registered_methods()]
        value = make('theirs' if get('layerwise') and get('ties') else 'broken')
        """
    install("their-package", "theirs = theirs_module:value", theirs_module=source)
    assert compat.get("theirs").spec.name == "theirs"
    assert warnings_of(caplog) == []


def test_threads_that_ask_at_once_get_one_method(install):
    install(
        "slow",
        "theirs = slow_module:value",
        slow_module="import time; time.sleep(0.1); value = make('theirs')",
    )
    start, found = threading.Barrier(4), []

    def work() -> None:
        start.wait()
        found.append(compat.get("theirs"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(map(id, found))) == 1


def test_methods_survive_a_reload_of_the_registry(install):
    from mergekit.merge_methods import registry

    install("their-package", "theirs = theirs_module:value", theirs_module="value = make('theirs')")
    assert compat.get("theirs").spec.name == "theirs"
    importlib.reload(registry)
    assert compat.get("theirs").spec.name == "theirs"
    assert compat.get("layerwise").spec.name == "layerwise"


# -- what a plugin costs --------------------------------------------------------------------------


def test_a_built_in_name_loads_no_plugin(install):
    install("their-package", "ties = never_module:value", never_module="value = make('ties')")
    assert compat.get("ties").spec.name == "ties"
    assert "never_module" not in sys.modules


def test_a_plugin_is_loaded_alone_when_its_name_is_asked_for(install):
    install("a", "first = a_module:value", a_module="value = make('first')")
    install("b", "second = b_module:value", b_module="value = make('second')")
    compat.get("second")
    assert "b_module" in sys.modules
    assert "a_module" not in sys.modules


BROKEN = {
    "missing import": ("import no_such_module_anywhere", "ModuleNotFoundError: No module named"),
    "does not parse": ("value = (", "SyntaxError"),
    "raises": ("raise ValueError('two\\nlines')", "ValueError: two lines"),
    "calls sys.exit": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "lacks the object": ("other = 1", "AttributeError"),
    "is of a wrong type": ("value = 42", "found int"),
    "is a text": ("value = 'theirs'", "found str"),
    "is a list of wrong things": ("value = [make('theirs'), 42]", "found int"),
    "factory raises": ("def value(): raise OSError('gone')", "OSError: gone"),
    "factory of nothing": ("def value(): return None", "found NoneType"),
    "factory of itself": ("def value(): return value", "RecursionError"),
    "kernel without decorator": ("def value(group): return group", "TypeError"),
    "another name": ("value = make('another')", "calls itself 'another', not 'theirs'"),
    "warns": ("import warnings; warnings.warn('old')\nvalue = 1", "UserWarning: old"),
    "without a spec": (
        "from mergekit.merge_methods import GroupMergeMethod\n"
        "class Method(GroupMergeMethod):\n"
        "    def merge_group(self, group, /): return group.tensors[0]\n"
        "value = Method()",
        "spec",
    ),
}


@pytest.mark.parametrize(("source", "why"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_costs_one_line_and_only_when_asked_for(install, caplog, source, why):
    install("their-package", "theirs = broken_module:value", broken_module=source)
    install("good", "good = good_module:value", good_module="value = make('good')")
    assert compat.get("linear").spec.name == "linear"
    assert compat.get("good").spec.name == "good"
    assert compat.get("layerwise").spec.name == "layerwise"
    assert warnings_of(caplog) == []

    for _ in range(2):
        with pytest.raises(errors.UnknownMethodError, match="installed but does not load") as error:
            compat.get("theirs")
        assert "theirs of their-package" in str(error.value)
        assert why in str(error.value)
    assert "good" in names()
    (line,) = warnings_of(caplog)
    assert why in line
    assert "\n" not in line


def test_an_entry_point_that_is_no_entry_point_is_reported_too(install, caplog):
    install("their-package", "theirs = not a module at all")
    assert "layerwise" in names()
    assert len(warnings_of(caplog)) == 1


def test_an_interrupt_while_a_plugin_loads_is_an_interrupt(install):
    install("a", "theirs = interrupted:value", interrupted="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        compat.get("theirs")


# -- names ----------------------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_the_nearest_ones(install):
    install("their-package", "alchemy = gold_module:value", gold_module="value = make('alchemy')")
    with pytest.raises(errors.UnknownMethodError, match="Did you mean 'alchemy'"):
        compat.get("alchmy")
    with pytest.raises(errors.UnknownMethodError, match="Did you mean 'dare_ties'"):
        compat.get("dare-ties")
    with pytest.raises(errors.UnknownMethodError, match=r"Known methods: .*alchemy.*layerwise"):
        compat.get("qqqqqqqq")


def test_an_alias_is_suggested_only_to_who_writes_one(install):
    compat.get("mku_layerwise")
    with pytest.raises(errors.UnknownMethodError, match=r"Did you mean 'layerwise'\?$"):
        compat.get("lairwise")
    with pytest.raises(errors.UnknownMethodError, match=r"Did you mean 'mku_layerwise'\?$"):
        compat.get("mku_lairwise")


def test_an_unknown_name_is_mergekits_own_kind_of_error(install):
    with pytest.raises(RuntimeError, match="Unimplemented merge method 'qqqqqqqq'"):
        compat.get("qqqqqqqq")


def test_a_built_in_method_hides_a_plugin_of_its_name_which_is_reported(install, caplog):
    builtin = compat.get("ties")
    install("their-package", "ties = ties_module:value", ties_module="value = make('ties')")
    assert compat.get("ties") is builtin
    assert warnings_of(caplog) == []
    for _ in range(2):
        assert names().count("ties") == 1
    assert warnings_of(caplog) == [
        "merge method ties of their-package is hidden by the one of mergekit"
    ]


def test_ours_hides_a_plugin_of_its_name_which_is_reported(install, caplog):
    install("aaa", "layerwise = aaa_module:value", aaa_module="value = make('layerwise')")
    assert compat.is_ours(compat.get("layerwise"))
    assert "aaa_module" not in sys.modules
    assert warnings_of(caplog) == [
        "merge method layerwise of aaa is hidden by the one of mergekit-unconstrained"
    ]


@pytest.mark.parametrize("first", ["the name", "the list"])
def test_who_wins_among_plugins_does_not_depend_on_what_was_asked_first(install, caplog, first):
    install("zzz", "same = zzz_module:value", zzz_module="value = make('same')")
    install("bbb", "same = bbb_module:value", bbb_module="value = make('same')")
    install("aaa", "bundle = aaa_module:value", aaa_module="value = [make('other'), make('same')]")
    if first == "the list":
        assert {"same", "other"} <= set(names())
    else:
        compat.get("other")
    method = compat.get("same")
    # The entry point that carries the name counts, of those the first by distribution.
    assert method.implementation.__module__ == "bbb_module"
    assert names().count("same") == 1
    assert set(warnings_of(caplog)) == {
        "merge method same of zzz is hidden by the one of bbb",
        "merge method same of aaa is hidden by the one of bbb",
    }


@pytest.mark.parametrize("name", catalog.CATALOG)
def test_each_of_our_methods_answers_to_its_alias_under_that_name(install, name):
    alias = compat.get(catalog.ALIAS_PREFIX + name)
    # mergekit's tasks look a method up again by its spec's name.
    assert alias.spec.name == catalog.ALIAS_PREFIX + name
    assert compat.get(alias.spec.name) is alias
    assert compat.is_ours(alias)
    assert compat.get(name).spec.name == name


def test_a_later_upstream_method_of_our_name_wins_but_the_alias_stays_ours(install, caplog):
    method = compat.renamed(compat.get("linear"), "layerwise")
    compat.register(method)
    assert compat.get("layerwise") is method
    assert compat.is_ours(compat.get("mku_layerwise"))
    assert warnings_of(caplog) == []  # who uses the alias knows
    assert names().count("layerwise") == 1
    assert warnings_of(caplog) == [
        "merge method layerwise of mergekit-unconstrained is hidden by the one of mergekit; "
        "`mku_layerwise` always means it"
    ]


# -- methods that merge whole models --------------------------------------------------------------


MODEL_LEVEL = """
    from mergekit.merge_methods import GroupMergeMethod, MergeMethodSpec

    class Whole(GroupMergeMethod):
        spec = MergeMethodSpec(name="whole")
        calls = []

        def merge_group(self, group, /, **parameters):
            raise TypeError("merges whole models")

        def merge_models(self, config, out_path, options, config_source=None):
            self.calls.append((config, out_path, options, config_source))
    """


def test_a_model_level_method_takes_over_before_models_are_looked_at(install, tmp_path):
    import mergekit.merge

    install("their-package", "whole = whole_module:Whole", whole_module=MODEL_LEVEL)
    config: Any = compat.MergeConfiguration.model_validate(
        {"merge_method": "whole", "models": [{"model": "no/such"}, {"model": "models/anywhere"}]}
    )
    options = compat.MergeOptions(quiet=True)
    mergekit.merge.run_merge(config, str(tmp_path / "out"), options, config_source="text")
    assert compat.get("whole").calls == [(config, str(tmp_path / "out"), options, "text")]
