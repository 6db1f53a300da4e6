"""Coefficient tables: what they say, and what they say when they are wrong."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.table import (
    Coefficients,
    Table,
    load_table,
    parse_table,
    short_name,
)
from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.numerics.roles import Role


def table(text: str) -> Table:
    return parse_table(Document.parse(text, "table.yml"))


EXAMPLE = """\
layers: 30
experts:
  arithmetic:
    default: 0.5
    embedding: 0.0
    head: {weight: 0.25}
    layers:
      0-9: {attention: 0.9, mlp: 0.2}
      10-28: {q: 0.4, attention: {weight: 0.6, density: 0.9}, all: {weight: 0.1, density: 0.5}}
      29: -0.75
  chat: {default: {weight: 0.3, density: 0.8}}
  code: 1
"""


@pytest.mark.parametrize(
    ("expert", "role", "weight", "density"),
    [
        # The group where the kind is not named, the default where neither is.
        ("arithmetic", Role("q", 0), 0.9, None),
        ("arithmetic", Role("qkv", 9), 0.9, None),
        ("arithmetic", Role("gate_up", 5), 0.2, None),
        ("arithmetic", Role("router", 5), 0.2, None),
        ("arithmetic", Role("norm", 5), 0.5, None),
        # Kind before group before all; weight and density each for itself.
        ("arithmetic", Role("q", 10), 0.4, 0.9),
        ("arithmetic", Role("k", 28), 0.6, 0.9),
        ("arithmetic", Role("up", 15), 0.1, 0.5),
        ("arithmetic", Role("norm", 15), 0.1, 0.5),
        ("arithmetic", Role("other", 15), 0.1, 0.5),
        # A bare number for a layer is for all of it.
        ("arithmetic", Role("down", 29), -0.75, None),
        # Outside the layers.
        ("arithmetic", Role("embedding"), 0.0, None),
        ("arithmetic", Role("head"), 0.25, None),
        ("arithmetic", Role("final_norm"), 0.5, None),
        ("arithmetic", Role("other"), 0.5, None),
        # A cell or a number for a whole expert.
        ("chat", Role("q", 3), 0.3, 0.8),
        ("chat", Role("head"), 0.3, 0.8),
        ("code", Role("up", 3), 1.0, None),
    ],
)
def test_the_most_exact_word_counts(
    expert: str, role: Role, weight: float, density: float | None
) -> None:
    assert table(EXAMPLE).lookup(expert, role) == Coefficients(weight, density)


def test_the_default_fills_what_a_cell_leaves_open() -> None:
    found = table(
        "layers: 1\n"
        "experts: {a: {default: {weight: 0.5, density: 0.8}, layers: {0: {q: {density: 0.1}}}}}"
    )
    assert found.lookup("a", Role("q", 0)) == Coefficients(0.5, 0.1)
    assert found.lookup("a", Role("k", 0)) == Coefficients(0.5, 0.8)


def test_without_a_default_a_table_says_nothing_about_what_it_does_not_name() -> None:
    found = table("layers: 2\nexperts: {a: {layers: {0: {q: 1.0}}}}")
    assert found.lookup("a", Role("k", 0)) == Coefficients()
    assert found.lookup("a", Role("q", 1)) == Coefficients()
    assert found.lookup("b", Role("q", 0)) == Coefficients()


@pytest.mark.parametrize("spelling", ["2-4", '"2-4"', "2 - 4", '" 2-4 "'])
def test_a_range_holds_both_its_ends(spelling: str) -> None:
    found = table(f"layers: 6\nexperts: {{a: {{default: 0, layers: {{{spelling}: 1}}}}}}")
    assert [found.lookup("a", Role("q", layer)).weight for layer in range(6)] == [0, 0, 1, 1, 1, 0]


def test_ranges_of_different_words_may_overlap() -> None:
    found = table("layers: 4\nexperts: {a: {layers: {0-3: {all: 1}, 1-2: {mlp: 2}, 2: {up: 3}}}}")
    assert [found.lookup("a", Role("up", layer)).weight for layer in range(4)] == [1, 2, 3, 1]


@pytest.mark.parametrize("number", ["5e-6", "5E-6", "5.0e-6", "0.000005", "'5e-6'"])
def test_a_number_may_be_written_with_an_exponent(number: str) -> None:
    """YAML 1.1 takes 5e-6, without a point, for a string."""
    found = table(f"layers: 1\nexperts: {{a: {number}}}")
    assert found.lookup("a", Role("q", 0)).weight == 5e-6


def test_json_is_a_table_too(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    content = {"layers": 4, "experts": {"a": {"default": 0.5, "layers": {"0-1": {"q": 1e-6}}}}}
    path.write_text(json.dumps(content, indent=2))
    found = load_table(str(path))
    assert found.lookup("a", Role("q", 1)).weight == 1e-6
    assert found.lookup("a", Role("q", 2)).weight == 0.5


# -- which expert is meant ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "short"),
    [
        ("math", "math"),
        ("org/math", "math"),
        ("./models/math", "math"),
        ("/data/models/math/", "math"),
        ("C:\\models\\math", "math"),
        ("org/math@main", "math"),
        ("org/math@0123abc", "math"),
        ("org/base+org/math", "math"),
        ("org/base@main+org/math@v2", "math"),
        ("org/base+./adapters/math/", "math"),
    ],
)
def test_an_expert_is_known_by_the_last_part_of_its_path(model: str, short: str) -> None:
    assert short_name(model) == short
    found = table("layers: 1\nexperts: {math: 0.7, base: 0.1}")
    assert found.key_for(model) == "math"
    assert found.lookup(model, Role("q", 0)).weight == 0.7


def test_the_same_words_as_in_the_recipe_come_first() -> None:
    found = table("layers: 1\nexperts: {one/math: 0.1, math: 0.2}")
    assert found.lookup("one/math", Role("q", 0)).weight == 0.1
    assert found.lookup("two/math", Role("q", 0)).weight == 0.2
    assert found.key_for("two/code") is None


# -- what is wrong --------------------------------------------------------------------------------

WRONG = [
    # (text, line, place, what the message says)
    ("layers: [", 1, "", "not YAML"),
    ("- 1", 1, "", "a mapping with `layers` and `experts`"),
    ("7", 1, "", "a mapping with `layers` and `experts`"),
    ("layers: 2\nexpert: {a: 1}", 2, "expert", "Did you mean 'experts'?"),
    ("experts: {a: 1}", None, "layers", "number of layers"),
    ("layers: 0\nexperts: {a: 1}", 1, "layers", "number of layers"),
    ("layers: true\nexperts: {a: 1}", 1, "layers", "number of layers"),
    ("layers: 2.0\nexperts: {a: 1}", 1, "layers", "number of layers"),
    ("layers: 2", None, "experts", "every expert"),
    ("layers: 2\nexperts: {}", 2, "experts", "every expert"),
    ("layers: 2\nexperts: [a, b]", 2, "experts", "every expert"),
    ("layers: 2\nlayers: 3\nexperts: {a: 1}", 2, "layers", "appears twice (first on line 1)"),
    ("layers: 2\nexperts:\n  a: 1\n  a: 2", 4, "experts.a", "appears twice (first on line 3)"),
    # words
    ("layers: 2\nexperts:\n  a:\n    defautl: 1", 4, "experts.a.defautl", "Did you mean 'default'"),
    ("layers: 2\nexperts:\n  a: {haed: 1}", 3, "experts.a.haed", "Did you mean 'head'?"),
    ("layers: 2\nexperts:\n  a: {q: 1}", 3, "experts.a.q", "put it below `layers:`"),
    ("layers: 2\nexperts:\n  a: {attention: 1}", 3, "experts.a.attention", "below `layers:`"),
    (
        "layers: 2\nexperts:\n  a:\n    layers:\n      0: {atention: 1}",
        5,
        "experts.a.layers[0].atention",
        "Did you mean 'attention'?",
    ),
    (
        "layers: 2\nexperts:\n  a:\n    layers:\n      0: {q_proj: 1}",
        5,
        "experts.a.layers[0].q_proj",
        "no such kind",
    ),
    (
        "layers: 2\nexperts:\n  a:\n    layers:\n      0: {head: 1}",
        5,
        "experts.a.layers[0].head",
        "belongs beside `layers:`",
    ),
    (
        "layers: 2\nexperts:\n  a:\n    default: {wieght: 1}",
        4,
        "experts.a.default.wieght",
        "Did you mean 'weight'?",
    ),
    # layers
    ("layers: 2\nexperts:\n  a: {layers: 0.5}", 3, "experts.a.layers", "must map layers"),
    ("layers: 2\nexperts:\n  a: {layers: [1]}", 3, "experts.a.layers", "must map layers"),
    (
        "layers: 2\nexperts:\n  a:\n    layers:\n      first: 1",
        5,
        "experts.a.layers.first",
        'a range of layers such as 3 or "4-7"',
    ),
    ("layers: 2\nexperts:\n  a: {layers: {-1: 1}}", 3, "experts.a.layers[-1]", "range of layers"),
    ("layers: 2\nexperts:\n  a: {layers: {0.5: 1}}", 3, "experts.a.layers.0.5", "range of layers"),
    ("layers: 2\nexperts:\n  a: {layers: {2: 1}}", 3, "experts.a.layers[2]", "last layer (1)"),
    ("layers: 2\nexperts:\n  a: {layers: {0-2: 1}}", 3, "experts.a.layers.0-2", "last layer (1)"),
    ("layers: 9\nexperts:\n  a: {layers: {3-2: 1}}", 3, "experts.a.layers.3-2", "2-3 is meant"),
    (
        "layers: 9\nexperts:\n  a:\n    layers:\n      0-3: {q: 1}\n      3-5: {q: 2}",
        6,
        "experts.a.layers.3-5.q",
        "layer 3 has a value for 'q' already, from 0-3",
    ),
    (
        "layers: 9\nexperts:\n  a:\n    layers:\n      0-3: 1\n      2: 2",
        6,
        "experts.a.layers[2].all",
        "layer 2 has a value for 'all' already, from 0-3",
    ),
    # numbers
    *(
        (f"layers: 2\nexperts:\n  a:\n    head: {value}", 4, "experts.a.head", says)
        for value, says in [
            (".nan", "finite"),
            (".inf", "finite"),
            ("-.inf", "finite"),
            ("nan", "finite"),
            ("1e999", "finite"),
            ("true", "not True"),
            ("no", "not False"),
            ("null", "not None"),
            ("", "not None"),
            ("much", "not 'much'"),
            ("[0.5]", "must be a number"),
            ("2026-01-01", "must be a number"),
        ]
    ),
    *(
        (
            f"layers: 2\nexperts:\n  a:\n    head: {{weight: 1, density: {value}}}",
            4,
            "experts.a.head.density",
            "between 0 and 1",
        )
        for value in ("1.01", "-0.1", ".nan", "1e3")
    ),
]


@pytest.mark.parametrize(("text", "line", "place", "says"), WRONG)
def test_a_wrong_table_is_told_the_line_and_the_right_word(
    text: str, line: int | None, place: str, says: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        table(text)
    message = str(caught.value)
    where = "table.yml" if line is None else f"table.yml:{line}"
    assert re.match(re.escape(where) + r"(:\d+)?: ", message), message
    if line is not None:
        assert message.startswith(f"{where}: {place}"), message
    assert says in message


def test_an_unknown_kind_far_from_all_words_lists_them() -> None:
    with pytest.raises(RecipeError, match=r"Known here: all, attention, down, gate, .*, v\."):
        table("layers: 1\nexperts: {a: {layers: {0: {zzzzzz: 1}}}}")


@pytest.mark.parametrize("value", ["0", "1", "0.5", "0.0", "1.0"])
def test_the_bounds_of_a_density_are_densities(value: str) -> None:
    found = table(f"layers: 1\nexperts: {{a: {{default: {{weight: 1, density: {value}}}}}}}")
    assert found.lookup("a", Role("q", 0)).density == float(value)


@pytest.mark.parametrize("value", ["-3", "0", "17.5", "-1e-30"])
def test_a_weight_may_be_any_finite_number(value: str) -> None:
    assert table(f"layers: 1\nexperts: {{a: {value}}}").lookup("a", Role("q", 0)).weight == float(
        value
    )


# -- files ----------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"coefficient table '.*none\.yml' does not exist"):
        load_table(str(tmp_path / "none.yml"))


def test_a_folder_and_bytes_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_table(str(tmp_path))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_table(str(tmp_path / "bytes"))


def test_a_table_is_read_once_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "table.yml"
    path.write_text("layers: 1\nexperts: {a: 0.1}")
    first = load_table(str(path))
    assert load_table(str(path)) is first
    path.write_text("layers: 1\nexperts: {a: 0.2}")
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert load_table(str(path)).lookup("a", Role("q", 0)).weight == 0.2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layers: 4\nexperts: {a: {default: {}}}", "says nothing"),
        ("layers: 4\nexperts: {a: {default: {weight: }}}", "says nothing"),
        ("layers: 4\nexperts: {a: {weight: 0.3, density: 0.5}}", "default: {weight"),
        (f"layers: 4\nexperts: {{a: {'9' * 400}}}", "must be a number"),
        ("layers: 4\nexperts: &a {a: *a}", "alias"),
    ],
)
def test_odd_cells_and_documents_are_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_table(Document.parse(text, "table.yml"))


def test_a_layer_may_be_written_in_any_way_of_yaml(tmp_path: Path) -> None:
    table = parse_table(Document.parse("layers: 4\nexperts: {a: {layers: {0x3: 1}}}", "t.yml"))
    assert table.experts["a"].inner[3, "all"].weight == 1
    json_file = tmp_path / "table.json"
    json_file.write_text('{\n\t"layers": 4,\n\t"experts": {"a": {"layers": {"0-3": 0.5}}}\n}')
    assert load_table(str(json_file)).experts["a"].inner[2, "all"].weight == 0.5
