"""The score cache: what was kept comes back, whatever was torn or written by others."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mergekit_unconstrained.errors import OutputError
from mergekit_unconstrained.evaluation.cache import ScoreCache
from mergekit_unconstrained.evaluation.records import Example, Message, Scored

EXAMPLES = [Example(str(i), (Message("user", f"q{i}"),), "t") for i in range(4)]
SCORED = [Scored(str(i), i / 4, f"said {i}\n", "why" * (i % 2)) for i in range(4)]


def test_what_was_kept_comes_back(tmp_path):
    ScoreCache(tmp_path).add("w", "k", EXAMPLES[:2], SCORED[:2])
    for cache in (ScoreCache(tmp_path), ScoreCache(tmp_path)):
        assert cache.known("w", "k", EXAMPLES) == [*SCORED[:2], None, None]
        assert cache.known("other", "k", EXAMPLES) == [None] * 4
        assert cache.known("w", "other", EXAMPLES) == [None] * 4
        assert cache.known("", "k", EXAMPLES) == [None] * 4


def test_an_example_is_known_by_its_content(tmp_path):
    cache = ScoreCache(tmp_path)
    cache.add("w", "k", EXAMPLES[:1], SCORED[:1])
    moved = Example("7", EXAMPLES[0].messages, "t")
    changed = Example("0", EXAMPLES[0].messages, "u")
    assert cache.known("w", "k", [moved, changed]) == [Scored("7", 0.0, "said 0\n", ""), None]


def test_nameless_weights_are_never_kept(tmp_path):
    ScoreCache(tmp_path).add("", "k", EXAMPLES, SCORED)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_passed_over_and_written_behind(tmp_path, cut):
    ScoreCache(tmp_path).add("w", "k", EXAMPLES[:2], SCORED[:2])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-cut])
    cache = ScoreCache(tmp_path)
    assert cache.known("w", "k", EXAMPLES[:2]) == [SCORED[0], None]
    cache.add("w", "k", EXAMPLES[2:3], SCORED[2:3])
    expected = [SCORED[0], SCORED[1] if cut == 1 else None, SCORED[2]]
    for reader in (cache, ScoreCache(tmp_path)):
        assert reader.known("w", "k", EXAMPLES[:3]) == expected


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\n",
        b"[]\n",
        b"{}\n",
        b"\n",
        b'{"weights": "w", "example": "e", "value": NaN, "said": "", "failure": ""}\n',
        b'{"weights": "w", "example": "e", "value": "x", "said": "", "failure": ""}\n',
    ],
)
def test_a_line_that_is_no_score_is_passed_over(tmp_path, line):
    cache = ScoreCache(tmp_path)
    cache.add("w", "k", EXAMPLES[:1], SCORED[:1])
    (file,) = tmp_path.iterdir()
    file.write_bytes(line + file.read_bytes() + line)
    assert ScoreCache(tmp_path).known("w", "k", EXAMPLES[:1]) == SCORED[:1]


def test_two_caches_see_what_the_other_adds(tmp_path):
    one, other = ScoreCache(tmp_path), ScoreCache(tmp_path)
    assert other.known("w", "k", EXAMPLES) == [None] * 4
    one.add("w", "k", EXAMPLES[:2], SCORED[:2])
    other.add("w", "k", EXAMPLES[2:], SCORED[2:])
    assert one.known("w", "k", EXAMPLES) == other.known("w", "k", EXAMPLES) == SCORED


def test_processes_that_append_at_once_lose_nothing(tmp_path):
    code = """
import sys
from mergekit_unconstrained.evaluation.cache import ScoreCache
from mergekit_unconstrained.evaluation.records import Example, Scored
cache = ScoreCache(sys.argv[1])
for i in range(100):
    cache.add(sys.argv[2], "k", [Example(str(i), (), str(i))], [Scored("", i, "x" * 20000)])
"""
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "abc"
    ]
    assert [process.wait() for process in running] == [0, 0, 0]
    asked = [Example(str(i), (), str(i)) for i in range(100)]
    for name in "abc":
        found = ScoreCache(tmp_path).known(name, "k", asked)
        assert [one.value for one in found if one] == list(range(100))


def test_half_a_character_survives(tmp_path):
    odd = Scored("0", 1.0, "a\ud800b\u2028c")
    ScoreCache(tmp_path).add("w", "k", EXAMPLES[:1], [odd])
    assert ScoreCache(tmp_path).known("w", "k", EXAMPLES[:1]) == [odd]


def test_a_folder_that_cannot_be_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"score cache .*cannot be made"):
        ScoreCache(tmp_path / "file" / "cache")
