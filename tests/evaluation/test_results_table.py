"""Tables of scores at any width of the terminal, and the reasons of failures."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mergekit_unconstrained.evaluation.records import Scored
from mergekit_unconstrained.evaluation.run import Results, TaskResult
from mergekit_unconstrained.present import evaluation as display

NAMES = [f"/models/of/some/length/candidate-{i}" for i in range(4)]


def results(models, tasks):
    """Every mean is another number."""
    return [
        Results(
            model,
            "test",
            tuple(
                TaskResult(f"task{j}", "exact match", 1.0, 1.0, values(i * tasks + j))
                for j in range(tasks)
            ),
        )
        for i, model in enumerate(models)
    ]


def values(number):
    return tuple(Scored(str(k), number / 1000 + k) for k in range(2))


def printed(found, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(display.table(found, width))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [50, 60, 80, 120, 400])
@pytest.mark.parametrize(("models", "tasks"), [(1, 1), (2, 9), (4, 2), (4, 12), (1, 30)])
def test_no_number_is_cut_and_no_line_too_long(models, tasks, width):
    found = results(NAMES[:models], tasks)
    text = printed(found, width)
    for one in found:
        for task in one.tasks:
            assert display.cell(task) in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    # folded, perhaps, but all of it
    whole = "".join(text.split()).replace("│", "").replace("┃", "")
    assert all(f"task{j}" in whole for j in range(tasks))


def test_models_are_rows_where_there_is_room_and_tasks_where_there_is_not():
    found = results(NAMES[:2], 9)
    wide, narrow = printed(found, 400), printed(found, 60)
    assert "task0 ┃" in wide.splitlines()[2]
    assert NAMES[1] in wide
    rows = [line for line in narrow.splitlines() if "task" in line]
    assert len(rows) == 9  # a task a line, with its scores of both models
    assert all(line.count("±") == 2 for line in rows)


def test_a_short_name_is_not_folded():
    text = printed(results(["base", "merge"], 2), 80)
    assert "│ base  │" in text


def failed(*reasons):
    scored = tuple(Scored(str(i), 0.0, failure=reason) for i, reason in enumerate(reasons))
    return [Results("m", "test", (TaskResult("t", "exact match", 1.0, 1.0, scored),))]


@pytest.mark.parametrize(
    ("reasons", "told"),
    [
        (
            ["the prompt has 130 tokens and the model reads 128 at most"] * 2
            + ["the prompt has 99.5 tokens and the model reads 128 at most", "crash", ""],
            "4 of 5 examples failed (3 x the prompt has … tokens and the model reads 128 at most)",
        ),
        (["crash", "stuck 1", "stuck 1"], "3 of 3 examples failed (2 x stuck 1)"),
        (["one", "two"], "2 of 2 examples failed (1 x one)"),
    ],
)
def test_reasons_that_differ_in_their_numbers_are_one(reasons, told):
    assert display.failures(failed(*reasons)) == [f"m on t: {told}"]
