"""Mathematics with a tool: blocks are run, outputs come back, the last words are the answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergekit_unconstrained.errors import DataError, RecipeError
from mergekit_unconstrained.evaluation.kinds.tools import ToolsSettings, ToolsTask, printed
from mergekit_unconstrained.evaluation.records import Message, Scored
from mergekit_unconstrained.evaluation.sandbox import Ran
from mergekit_unconstrained.evaluation.subject import Continuation
from tests.evaluation.speaking import Answer, Speaking


def task(folder: Path, rows: list[dict], **settings) -> ToolsTask:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    told = {"kind": "tools", "data": "rows.jsonl", "allow_code": True, "packages": [], **settings}
    return ToolsTask("maths", ToolsSettings.model_validate(told), folder)


def scored(folder: Path, *turns: Answer, target: object = 6, **settings) -> tuple[Scored, Speaking]:
    """One example; the model says the turns in their order."""
    made = task(folder, [{"prompt": "2 * 3?", "target": target}], **settings)
    left = list(turns)
    subject = Speaking(lambda _: left.pop(0), templated=settings.pop("chat", None) is True)
    (one,) = made.score(subject, made.examples("test"))
    assert left == []
    return one, subject


def program(code: str) -> str:
    return f"Let me compute.\n```python\n{code}\n```\n"


def test_a_block_is_run_and_its_output_shown(tmp_path):
    one, subject = scored(tmp_path, program("print(2 * 3)"), "The answer is 6.")
    assert (one.value, one.failure) == (1.0, "")
    assert [batch[0][-1].content for batch in subject.asked] == [
        "2 * 3?\n",
        "2 * 3?\nLet me compute.\n```python\nprint(2 * 3)\n```\n```output\n6\n```\n",
    ]
    assert one.said == subject.asked[1][0][0].content.removeprefix("2 * 3?\n") + "The answer is 6."
    assert subject.stops == ("```output",)


@pytest.mark.parametrize(("separator", "between"), [("auto", "\n"), ("", ""), (" => ", " => ")])
def test_what_stands_before_the_answer_stands_there_once(tmp_path, separator, between):
    one, subject = scored(tmp_path, program("2 * 3"), "So 6.", separator=separator)
    first, second = (batch[0][-1].content for batch in subject.asked)
    assert first == f"2 * 3?{between}"
    assert second == first + one.said.removesuffix("So 6.")
    assert set(subject.separators) == {""}  # nothing more is put between


def test_with_a_chat_template_the_output_is_the_next_message(tmp_path):
    one, subject = scored(tmp_path, program("2 * 3"), "So 6.", chat=True)
    assert one.value == 1.0
    assert subject.asked[1][0] == (
        Message("user", "2 * 3?"),
        Message("assistant", "Let me compute.\n```python\n2 * 3\n```"),
        Message("user", "```output\n6\n```\n"),
    )


def test_what_is_written_behind_a_block_without_knowing_its_output_is_dropped(tmp_path):
    guessed = program("print(6)") + "```output\n7\n```\nThe answer is 7."
    one, _ = scored(tmp_path, guessed, "It is 6")
    assert one.value == 1.0
    assert "7" not in one.said


def test_an_answer_without_a_program_is_an_answer(tmp_path):
    assert scored(tmp_path, "2 * 3 = 6")[0].value == 1.0
    assert scored(tmp_path, "2 * 3 = 5")[0].value == 0.0


def test_definitions_stay_from_block_to_block_but_failed_blocks_do_not(tmp_path):
    one, subject = scored(
        tmp_path,
        program("print('once')\nx = 2\ndef f(y): return x * y"),
        program("x = 100\nraise ValueError('no luck')"),
        program("f(3)"),
        "The answer is 6",
    )
    outputs = [batch[0][-1].content.split("```output\n")[-1] for batch in subject.asked[1:]]
    assert outputs == ["once\n```\n", "ValueError: no luck\n```\n", "6\n```\n"]
    assert one.value == 1.0


def test_after_the_last_round_nothing_is_run(tmp_path):
    one, subject = scored(tmp_path, program("5"), program("print(6)"), target=5, rounds=1)
    assert len(subject.asked) == 2
    assert one.value == 1.0  # no number in the last words: the last output is the answer
    assert one.said.endswith("print(6)\n```\n")


def test_numbers_in_programs_are_no_answers(tmp_path):
    said = "As computed.\n```python\nprint(6)\n```\n"
    one, _ = scored(tmp_path, program("print(5)"), said, rounds=1)
    assert one.value == 0.0


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("while True: pass", "the program ran longer than 0.5 seconds"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("print(1)\nopen('/etc/passwd')", "1\nPermissionError: outside the sandbox: '/etc/passwd'"),
        ("import os\nos._exit(0)", "the program ended without a word"),
        ("x = 3", "(nothing was printed)"),
        ("print(", "SyntaxError: '(' was never closed"),
        ("x = [0] * 10**12", "the program needed more than 1024 MB of memory"),
    ],
)
def test_what_goes_wrong_is_shown_and_the_conversation_goes_on(code, shown, tmp_path):
    one, subject = scored(tmp_path, program(code), "It must be 6", time_limit=0.5)
    assert subject.asked[1][0][-1].content.split("```output\n")[1] == f"{shown}\n```\n"
    assert (one.value, one.failure) == (1.0, "")


def test_much_output_is_cut():
    settings = ToolsSettings.model_validate({"kind": "tools", "data": "a"})
    shown = printed(Ran("x" * 9999, "", "ok"), settings)
    assert shown == "x" * 2000 + "..."


def test_an_answer_that_never_stops_is_a_failure(tmp_path):
    endless = Continuation("```python\nx = 1 + 1 + 1", "did not stop within 9 tokens")
    one, subject = scored(tmp_path, endless)
    assert (one.value, one.failure) == (0.0, "did not stop within 9 tokens")
    assert len(subject.asked) == 1  # half a program is not run


def test_a_turn_that_ends_without_closing_its_fence_is_a_program(tmp_path):
    one, subject = scored(tmp_path, "```python\nprint(6)", "6")
    assert "```python\nprint(6)\n```\n```output\n6" in subject.asked[1][0][-1].content
    assert one.value == 1.0


def test_only_those_still_in_conversation_are_asked_again(tmp_path):
    rows = [{"prompt": f"{i}?", "target": i} for i in range(4)]
    made = task(tmp_path, rows)

    def say(asked: str) -> str:
        number = int(asked[0])
        if number % 2:
            return f"The answer is {number}"
        done = asked.count("output")
        return program(f"print({done})") if done < number else f"The answer is {done}"

    subject, done = Speaking(say), []
    scores = made.score(subject, made.examples("test"), done.append)
    assert [(one.id, one.value) for one in scores] == [(str(i), 1.0) for i in range(4)]
    assert [len(batch) for batch in subject.asked] == [4, 1, 1]
    assert sum(done) == 4


def test_words_can_be_the_answer(tmp_path):
    turns = program("print('PARIS')"), "Paris."
    assert scored(tmp_path, *turns, target="Paris", answer="exact")[0].value == 1.0
    assert scored(tmp_path, *turns, target="paris", answer="exact")[0].value == 0.0


def test_it_refuses_without_leave(tmp_path):
    with pytest.raises(RecipeError, match=r"task 'maths' runs Python .* --allow-code"):
        task(tmp_path, [], allow_code=False)


def test_a_target_without_a_number_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl:1: 'target' holds no number: 'six'"):
        task(tmp_path, [{"prompt": "a", "target": "six"}]).examples("test")


def test_sympy_is_at_hand(tmp_path):
    pytest.importorskip("sympy")
    code = "from sympy import *\nx = symbols('x')\nsolve(x**2 - 36, x)[1]"
    packages = ToolsSettings.model_fields["packages"].default
    one, _ = scored(tmp_path, program(code), "As found.", packages=packages, time_limit=60)
    assert one.value == 1.0
