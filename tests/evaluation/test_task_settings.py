"""The tasks file: strict, every mistake one error that names file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_unconstrained.errors import DataError, RecipeError
from mergekit_unconstrained.evaluation.kinds import KINDS, kind_class
from mergekit_unconstrained.evaluation.settings import TaskSettings, load_tasks

ROW = {"prompt": "q", "target": "a"}


def test_a_file_becomes_tasks_in_its_order(write_tasks):
    path = write_tasks(
        {
            "b": {"kind": "exact", "data": "rows.jsonl", "weight": 2},
            "a": {"kind": "likelihood", "data": {"search": "rows.jsonl", "test": "rows.jsonl"}},
        },
        rows=[ROW, ROW],
    )
    second, first = sorted(load_tasks(path), key=lambda task: task.name, reverse=True)
    assert [task.name for task in load_tasks(path)] == ["a", "b"]  # as safe_dump sorts them
    assert (second.weight, second.splits(), first.splits()) == (2.0, ("test",), ("search", "test"))
    assert [example.id for example in second.examples("test")] == ["0", "1"]
    assert second.chat is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- 1", r"tasks.yml:1: a tasks file has the key `tasks`"),
        ("task: {}", r"tasks.yml:1: task: no such key. Did you mean 'tasks'\?"),
        ("tasks: []", r"tasks.yml:1: tasks: `tasks` maps names to tasks"),
        ("tasks: {}", r"`tasks` maps names to tasks"),
        ("tasks:\n  a: exact", r"tasks.yml:2: tasks.a: a task maps settings to values"),
        ("tasks:\n  a: {data: x}", r"tasks.yml:2: tasks.a: has no `kind`. Known here: choice"),
        (
            "tasks:\n  a:\n    kind: exakt",
            r"tasks.yml:3: tasks.a.kind: no kind of task is called 'exakt'. Did you mean 'exact'",
        ),
        (
            "tasks:\n  a:\n    kind: exact\n    dat: x",
            r"tasks.yml:4: tasks.a.dat: no such setting of `kind: exact`. Did you mean 'data'\?",
        ),
        ("tasks:\n  a:\n    kind: exact", r"tasks.yml:2: tasks.a: `data` is missing"),
        (
            "tasks:\n  a:\n    kind: exact\n    data: x\n    weight: -1",
            r"tasks.yml:5: tasks.a.weight: -1 will not do: .*greater than or equal to 0",
        ),
        (
            "tasks:\n  a:\n    kind: exact\n    data: {train: x}",
            r"tasks.yml:4: tasks.a.data.train: 'train' will not do: .*'search', 'development'",
        ),
        ("tasks:\n  a: {kind: exact, data: {}}", r"tasks.a.data: .*name the file of at least one"),
        (
            "tasks:\n  a: {kind: exact, data: x, chat: maybe}",
            r"tasks.yml:2: tasks.a.chat: 'maybe' will not do",
        ),
        ("tasks:\n  a: {kind: exact, data: x, stop: ['']}", r"tasks.a.stop: .*an empty text"),
        ("tasks:\n  a: {kind: exact, data: x, pattern: '('}", r"a.pattern: .*not a regular expr"),
        ("tasks:\n  a: {kind: exact, data: x}\n  a: {}", r"tasks.yml:3: tasks.a: appears twice"),
        ("tasks: {a: {kind: choice, data: x, normalise: words}}", r"a.normalise: 'words' will not"),
        ("tasks: {a: {kind: gym, generator: x, seeds: {}}}", r"a.seeds: \{\} will not do"),
    ],
)
def test_a_mistake_is_one_clear_error(tmp_path, monkeypatch, text, told):
    monkeypatch.chdir(tmp_path)
    Path("tasks.yml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=told) as error:
        load_tasks("tasks.yml")
    assert "\n" not in str(error.value)


def test_a_tasks_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(RecipeError, match=r"tasks file .*none.yml' does not exist"):
        load_tasks(tmp_path / "none.yml")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "does not exist"),
        (b"", "has no rows"),
        (b"\xff\xfe", "is not UTF-8"),
        (b'{"prompt": "q", "target": "a"}\n{"prompt"', "rows.jsonl:2: this line is not JSON"),
        (b"[1]", "rows.jsonl:1: every line is one object"),
    ],
)
def test_a_data_file_that_will_not_do_is_one_clear_error(write_tasks, tmp_path, content, told):
    path = write_tasks({"a": {"kind": "exact", "data": "rows.jsonl"}})
    if content is not None:
        (tmp_path / "rows.jsonl").write_bytes(content)
    (task,) = load_tasks(path)
    with pytest.raises(DataError, match=told):
        task.examples("test")


@pytest.mark.parametrize(
    ("talk", "told"),
    [
        ([], r"must be a list of \{role, content\}"),
        ("hi", "must be a list"),
        ([{"role": "robot", "content": "x"}], 'and holds {"role": "robot"'),
        ([{"role": "user"}], 'and holds {"role": "user"}'),
        ([{"role": "assistant", "content": "x"}], "ends with the assistant's words"),
    ],
)
def test_messages_that_will_not_do_are_one_clear_error(make_task, talk, told):
    with pytest.raises(DataError, match=f"t.jsonl:1: 'talk' .*{told}|t.jsonl:1: 'talk' {told}"):
        make_task([{"talk": talk, "target": "a"}], kind="exact", messages="talk").examples("test")


def test_limit_takes_the_first_rows_and_reads_no_further(make_task, tmp_path):
    task = make_task([{**ROW, "prompt": str(i)} for i in range(5)], kind="exact", limit=2)
    with (tmp_path / "t.jsonl").open("a", encoding="utf-8") as file:
        file.write("broken")
    assert [e.messages[0].content for e in task.examples("test")] == ["0", "1"]


def test_lm_eval_separates_for_itself(write_tasks):
    path = write_tasks({"a": {"kind": "harness", "task": "gsm8k", "separator": ""}})
    with pytest.raises(RecipeError, match="no such setting of `kind: harness`"):
        load_tasks(path)


def test_the_key_changes_with_what_a_score_depends_on_only(make_task):
    plain = make_task([ROW], kind="exact").key
    same = [{"weight": 3}, {"limit": 1}, {"system": "Hi."}, {"allow_test_split": True}]
    other = [
        {"max_new_tokens": 3},
        {"chat": False},
        {"separator": ""},
        {"ignore_case": True},
        {"stop": ["x"]},
    ]
    assert {make_task([ROW], kind="exact", **settings).key for settings in same} == {plain}
    keys = {make_task([ROW], kind="exact", **settings).key for settings in other}
    assert len(keys | {plain}) == len(other) + 1
    assert make_task([ROW], kind="regex").key != plain
    system = make_task([ROW], kind="exact", system="Hi.").examples("test")[0]
    assert system.digest != make_task([ROW], kind="exact").examples("test")[0].digest


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_there_with_explained_settings(kind):
    found = kind_class(kind)
    assert issubclass(found.settings_class, TaskSettings)
    assert found.unit
    for name, field in found.settings_class.model_fields.items():
        assert field.description, f"{kind}: {name}"
