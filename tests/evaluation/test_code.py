"""Programming tasks: an answer counts when all of its tests pass, and in no other case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergekit_unconstrained.errors import DataError, RecipeError
from mergekit_unconstrained.evaluation.kinds.code import CodeSettings, CodeTask, answer_parts
from mergekit_unconstrained.evaluation.programs import blocks, first_block, without_blocks
from mergekit_unconstrained.evaluation.records import Example, Message
from mergekit_unconstrained.evaluation.settings import load_tasks
from mergekit_unconstrained.evaluation.subject import Continuation
from tests.evaluation.speaking import Speaking

HUMANEVAL = {
    "prompt": 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """Sum."""\n',
    "test": "def check(f):\n    assert f([1, 2]) == 3\n    assert f([]) == 0",
    "entry_point": "total",
}
MBPP = {
    "prompt": "Write a function to square a number, called square.",
    "test": ["assert square(3) == 9", "assert square(-2) == four"],
    "setup": "four = 4",
}


def task(folder: Path, rows: list[dict], **settings) -> CodeTask:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    told = {"kind": "code", "data": "rows.jsonl", "allow_code": True, "time_limit": 5, **settings}
    return CodeTask("code", CodeSettings.model_validate(told), folder)


def humaneval(folder: Path, said: str | Continuation, **settings) -> tuple[float, str]:
    made = task(folder, [HUMANEVAL], entry_point="entry_point", **settings)
    (one,) = made.score(Speaking(lambda _: said), made.examples("test"))
    return one.value, one.failure


def mbpp(folder: Path, said: str) -> tuple[float, str]:
    made = task(folder, [MBPP], setup="setup")
    (one,) = made.score(Speaking(lambda _: said), made.examples("test"))
    return one.value, one.failure


@pytest.mark.parametrize(
    "said",
    [
        "    return sum(xs)\n",
        "    return sum(xs)\n\nHope this helps!",
        "    return sum(xs)\n\nif __name__ == '__main__':\n    print(total(input()))\n",
        "Sure:\n```python\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```\nIt adds.",
        "```\ndef total(xs):\n    return sum(xs)\n```\nUse it:\n```py\nprint(total([1]))\n```",
        "```python\nfrom __future__ import annotations\ndef total(xs): return sum(xs)",
        "def total(xs):\n    return sum(xs)",
        "```python\n    return sum(xs)\n```",
    ],
)
def test_a_right_function_passes_however_it_is_given(said, tmp_path):
    assert humaneval(tmp_path, said) == (1.0, "")


@pytest.mark.parametrize(
    "said",
    [
        "    return 3\n",
        "    return sum(xs",
        "",
        "I would add them.",
        "    import sys\n    sys.exit(0)\n",
        "    return sum(xs)\nimport sys\nsys.exit(0)\n",
        "    raise SystemExit\n",
        "```python\nclass Equal:\n    pass\n```",
    ],
)
def test_a_wrong_one_fails(said, tmp_path):
    assert humaneval(tmp_path, said)[0] == 0.0


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("    while True: pass\n", "the program ran longer than 0.5 seconds"),
        ("    return [0] * 10**12\n", "the program needed more than 1024 MB of memory"),
        ("    import os\n    os._exit(0)\n", "the program ended without a word"),
    ],
)
def test_a_program_that_never_ends_or_dies_is_a_failure_that_says_so(said, told, tmp_path):
    assert humaneval(tmp_path, said, time_limit=0.5) == (0.0, told)


def test_an_answer_cut_at_the_token_limit_is_judged_all_the_same(tmp_path):
    said = Continuation("    return sum(xs)\n\ndef mo", "did not stop within 9 tokens")
    assert humaneval(tmp_path, said) == (1.0, "did not stop within 9 tokens")


def test_lists_of_assertions_with_a_setup(tmp_path):
    assert mbpp(tmp_path, "```python\ndef square(x):\n    return x * x\n```") == (1.0, "")
    assert mbpp(tmp_path, "def square(x):\n    return x * x") == (1.0, "")
    assert mbpp(tmp_path, "```python\ndef square(x):\n    return x + 5\n```")[0] == 0.0


def test_many_answers_keep_their_order(tmp_path):
    rows = [{"prompt": f"{i}", "test": f"assert answer == {i}"} for i in range(6)]
    made = task(tmp_path, rows)
    wrong = {"1", "4"}
    done = []
    subject = Speaking(lambda asked: "answer = 9" if asked in wrong else f"answer = {asked}")
    scores = made.score(subject, made.examples("test"), done.append)
    assert [(one.id, one.value) for one in scores] == [
        (str(i), float(str(i) not in wrong)) for i in range(6)
    ]
    assert sum(done) == 6
    assert scores[1].said == "answer = 9"


def test_it_refuses_without_leave(tmp_path):
    with pytest.raises(RecipeError, match=r"task 'code' runs Python .* --allow-code"):
        task(tmp_path, [MBPP], allow_code=False)


def test_leave_is_given_by_the_file_or_by_the_command(tmp_path):
    task(tmp_path, [HUMANEVAL])
    tasks = tmp_path / "tasks.yml"
    text = "tasks:\n  he: {kind: code, data: rows.jsonl, entry_point: entry_point}\n"
    tasks.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match="--allow-code"):
        load_tasks(tasks)
    (made,) = load_tasks(tasks, allow_code=True)
    assert made.examples("test")[0].extra["entry_point"] == "total"
    tasks.write_text(text.replace("data", "allow_code: true, data"), encoding="utf-8")
    (same,) = load_tasks(tasks)
    assert same.key == made.key  # leave changes no score


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"prompt": "a", "tests": "x"}, {}, r"no column 'test' .*Did you mean 'tests'"),
        ({"prompt": "a", "test": ""}, {}, "every answer would pass"),
        ({"prompt": "a", "test": []}, {}, "list of Python statements"),
        ({"prompt": "a", "test": 3}, {}, "list of Python statements"),
        ({"prompt": "a", "test": "assert ("}, {}, "is not Python"),
        ({**HUMANEVAL, "entry_point": "a b"}, {"entry_point": "entry_point"}, "no name"),
    ],
)
def test_rows_that_cannot_be_used_are_named(row, settings, message, tmp_path):
    with pytest.raises(DataError, match=rf"rows.jsonl:1: .*{message}"):
        task(tmp_path, [row], **settings).examples("test")


def test_there_is_no_target():
    with pytest.raises(ValueError, match="the tests judge"):
        CodeSettings.model_validate({"kind": "code", "data": "a", "target": "b"})


def test_the_prompt_stays_in_front_where_it_is_python():
    asked = Example("0", (Message("user", HUMANEVAL["prompt"]),), extra={"entry_point": "total"})
    own = "def total(xs: List[int]): return sum(xs)\n"
    assert answer_parts(asked, f"```python\n{own}```") == (HUMANEVAL["prompt"], own)
    begun = Example("0", (Message("user", "def total(xs):"),), extra={"entry_point": "total"})
    assert answer_parts(begun, " return 1", "") == ("def total(xs): return 1",)
    assert answer_parts(begun, "  return 1", "auto") == ("def total(xs):\n  return 1",)
    spoken = Example("0", (Message("user", MBPP["prompt"]),))
    assert answer_parts(spoken, "x = 1") == ("x = 1",)


def test_fences():
    text = "A\n```python\na = 1\n```\nB\n```bash\nls\n```\n```\nb = 2\n```\n```py\nc = '''```'''\n"
    assert blocks(text) == ["a = 1\n", "b = 2\n", "c = '''```'''\n"]
    block = first_block(text)
    assert (block.code, block.closed, text[: block.end]) == ("a = 1\n", True, text[:21])
    assert first_block("```\nx\n```") is None
    assert not first_block("```python\nx = 1").closed
    assert without_blocks("The\n```python\n1\n```\nend 5").split() == ["The", "end", "5"]
