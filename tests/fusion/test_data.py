"""Every usual form of instruction data is read alike, and nothing is left out silently."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.fusion.data.conversations import (
    DataReport,
    fingerprint,
    read_conversations,
)
from mergekit_unconstrained.fusion.records import Conversation, Turn
from mergekit_unconstrained.fusion.settings import Columns

ASKED, ANSWER = "How many?", "Seven."
PAIR = (Turn("user", ASKED), Turn("assistant", ANSWER))
GOOD = {"question": ASKED, "answer": ANSWER}


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(dataset: str, report: DataReport | None = None, **settings: Any) -> list[Conversation]:
    columns = settings.pop("columns", Columns())
    return list(read_conversations(dataset, columns, report=report, **settings))


def turns(tmp_path: Path, row: Any, columns: Columns | None = None) -> tuple[Turn, ...]:
    (one,) = read(write(tmp_path / "d.jsonl", [row]), columns=columns or Columns())
    return one.turns


# -- columns --------------------------------------------------------------------------------------


def messages(first: str, second: str, **names: str) -> list[dict[str, str]]:
    said = {"role": "role", "content": "content", "user": "user", "assistant": "assistant", **names}
    return [
        {said["role"]: said["user"], said["content"]: first},
        {said["role"]: said["assistant"], said["content"]: second},
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": ASKED, "response": ANSWER},
        {"prompt": ASKED, "completion": ANSWER},
        {"prompt": messages(ASKED, "")[:1], "completion": messages("", ANSWER)[1:]},
        GOOD,
        {"problem": ASKED, "solution": ANSWER, "answer": "7"},
        {"messages": messages(ASKED, ANSWER)},
        {"messages": messages(ASKED, ANSWER), "prompt": "x", "response": "y"},
        {"messages": {"role": ["user", "assistant"], "content": [ASKED, ANSWER]}},
        {"messages": [*messages(ASKED, ANSWER), {"role": "user", "content": "unanswered"}]},
        {"messages": [{**m, "content": [{"text": m["content"]}]} for m in messages(ASKED, ANSWER)]},
        {
            "conversations": messages(
                ASKED, ANSWER, role="from", content="value", user="human", assistant="gpt"
            )
        },
        {"instruction": ASKED, "input": "", "output": ANSWER},
    ],
)
def test_the_usual_forms_say_the_same(tmp_path: Path, row: Any) -> None:
    assert turns(tmp_path, row) == PAIR


def test_the_input_of_alpaca_follows_the_instruction(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "unused"}
    assert turns(tmp_path, row) == (Turn("user", "Add.\n1 and 2"), Turn("assistant", "3"))


@pytest.mark.parametrize("row", [GOOD, {"messages": messages(ASKED, ANSWER)}])
def test_a_system_column_becomes_the_first_message(tmp_path: Path, row: Any) -> None:
    assert turns(tmp_path, {"system": "Be brief.", **row}) == (Turn("system", "Be brief."), *PAIR)


def test_several_turns_keep_their_order(tmp_path: Path) -> None:
    row = {"messages": [*messages("a", "b"), *messages("c", "d")]}
    said = [(turn.role, turn.text) for turn in turns(tmp_path, row)]
    assert said == [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def test_named_columns_go_before_the_usual_ones(tmp_path: Path) -> None:
    row = {"question": "no", "answer": "no", "q": ASKED, "a": ANSWER, "messages": "no"}
    assert turns(tmp_path, row, Columns(instruction="q", response="a")) == PAIR
    half = {"question": ASKED, "answer": "no", "rationale": ANSWER}
    assert turns(tmp_path, half, Columns(response="rationale")) == PAIR


def test_without_a_response_column_the_error_lists_columns_and_suggests(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"question": "q", "Respons": "r", "id": 3}])
    with pytest.raises(DataError) as caught:
        read(data)
    message = str(caught.value)
    for part in (data, "response column", "'question', 'Respons', 'id'", "completion, answer"):
        assert part in message
    assert "`columns: {response: 'Respons'}`" in message


def test_the_column_of_the_prompt_is_not_proposed_for_the_response(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`columns: \{response: NAME\}`"):
        read(write(tmp_path / "d.jsonl", [{"instruction": "q", "foo": "r"}]))


def test_a_named_column_that_is_not_there_gets_the_nearest(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [GOOD])
    with pytest.raises(DataError, match=r"no column 'anwser' .*Did you mean 'answer'"):
        read(data, columns=Columns(response="anwser"))


# -- rows -----------------------------------------------------------------------------------------


def test_rows_that_cannot_be_used_are_counted_and_listed(tmp_path: Path) -> None:
    bad: list[tuple[bytes, str]] = [
        (b'{"question": "q", "answer": "  "}', "empty response"),
        (b'{"question": "q", "answer": ""}', "empty response"),
        (b'{"question": "q", "answer": null}', "no response"),
        (b'{"question": "q"}', "no response"),
        (b'{"question": "q", "answer": 42}', "assistant is not text but int"),
        (b'{"question": "q", "answer": "\\ud800"}', "assistant is not valid Unicode"),
        (b'{"question": "q", "answer": "\xff"}', "not UTF-8"),
        (b'{"question": " ", "answer": "r"}', "empty prompt"),
    ]
    good = json.dumps(GOOD).encode()
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join([good, *(line for line, _ in bad), b"", good]))
    report = DataReport()
    found = read(str(path), report)
    assert [one.row for one in found] == [0, len(bad) + 1]
    expected: dict[str, list[int]] = {}
    for row, (_, reason) in enumerate(bad, 1):
        expected.setdefault(reason, []).append(row)
    assert report.rows == expected
    assert (report.read, report.kept) == (len(bad) + 2, 2)
    assert "2 empty response (rows 1, 2)" in report.describe()
    assert json.loads(json.dumps(report.as_dict()))["left_out"]["not UTF-8"] == 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("text", "messages are no list"),
        (["text"], "a message is no mapping"),
        ([{"role": "user", "content": "q"}], "no response"),
        ([{"role": "tool", "content": "q"}], "role 'tool' is not supported"),
        ([{"role": "user", "content": [{"image": 1}]}], "user content is not text"),
        ({"role": ["user"], "content": []}, "messages are no list"),
        (None, "no response"),
        ([], "no response"),
    ],
)
def test_broken_messages_have_a_reason(tmp_path: Path, value: Any, reason: str) -> None:
    rows = [{"messages": messages(ASKED, ANSWER)}, {"messages": value}]
    report = DataReport()
    assert len(read(write(tmp_path / "d.jsonl", rows), report)) == 1
    assert report.rows == {reason: [1]}


def test_a_long_list_of_rows_is_told_in_short() -> None:
    report = DataReport("d", 40)
    for row in range(30):
        report.skip(row, "empty response")
    report.skip(33, "not UTF-8")
    assert report.describe() == (
        "9 of 40 rows of d are used; left out, counting from row 0: 30 empty response "
        "(rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...), 1 not UTF-8 (row 33)"
    )


def test_data_without_a_usable_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row can be used: 0 of 1 rows .* 1 empty response"):
        read(write(tmp_path / "d.jsonl", [{"question": "q", "answer": ""}]))
    with pytest.raises(DataError, match="holds no rows"):
        read(write(tmp_path / "e.jsonl", []))


def test_max_rows_are_the_first_of_the_file(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"question": "q", "answer": ""}, *[GOOD] * 5])
    assert [one.row for one in read(data, max_rows=3)] == [1, 2]


def test_text_is_read_in_one_normal_form(tmp_path: Path) -> None:
    decomposed = "Cafe\u0301"
    assert turns(tmp_path, {"question": "q", "answer": decomposed})[1].text == "Café"


# -- files ----------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_conversations(tmp_path: Path) -> None:
    rows = [{"question": f"q, {i}", "answer": f'"{i}"\nü'} for i in range(700)]
    expected = read(write(tmp_path / "d.jsonl", rows))
    (tmp_path / "list.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    write(tmp_path / "lines.json", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    with (tmp_path / "d.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    assert len(expected) == 700
    for name in ("list.json", "lines.json", "d.parquet", "d.csv"):
        assert read(str(tmp_path / name)) == expected, name


def test_saved_datasets_and_their_splits_are_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    one = Dataset.from_list([GOOD])
    one.save_to_disk(tmp_path / "one")
    DatasetDict(train=one, test=one).save_to_disk(tmp_path / "two")
    assert read(str(tmp_path / "one")) == read(str(tmp_path / "two"), split="test")
    with pytest.raises(DataError, match=r"no split 'tran'. Did you mean 'train'"):
        read(str(tmp_path / "two"), split="tran")
    with pytest.raises(DataError, match="not a folder that `datasets` saved"):
        read(str(tmp_path))


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    good = json.dumps(GOOD)
    path.write_text(f"{good}\n\n{good[:-4]}\n{good}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"d\.jsonl:3: this line is not JSON"):
        read(str(path))
    write(path, [GOOD, ["a list"]])
    with pytest.raises(DataError, match=r"d\.jsonl:2: a row is a JSON object, this line is a list"):
        read(str(path))


def test_lines_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(GOOD) + "\n{broken", encoding="utf-8")
    stream = read_conversations(str(path), Columns())
    assert next(stream).turns == PAIR  # before the broken line is met


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", b"[{]", "d.json: this is not JSON"),
        ("d.json", b"[3]", "row 0 is a int"),
        ("d.parquet", b"PAR1 and no more", "not a complete Parquet file"),
        ("d.csv", b"question,answer\na,b,c\n", "d.csv:2: more cells than the header"),
        ("d.csv", b"question,answer,answer\na,b,c\n", "d.csv:1: two columns .* 'answer'"),
        ("d.csv", b'question,answer\na,b\na,"b\nc,d\n', "d.csv:3: .* a quote .* never closed"),
        ("d.csv", b"question;answer\na;b\n", "d.csv:1: .* one column, .* not by ';'"),
        ("d.xlsx", b"", "files of kind '.xlsx'"),
        ("data", b"", "files of kind 'without a suffix'"),
    ],
)
def test_files_that_are_no_data_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(str(tmp_path / name))


def test_bytes_that_are_not_utf8_cost_a_row_in_csv_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(b"question,answer\nq,\xff\nq,r\n")
    cells = pa.array([b"\xff", b"r"]).view(pa.string())
    pq.write_table(
        pa.table({"question": pa.array(["q", "q"]), "answer": cells}), tmp_path / "d.parquet"
    )
    for name in ("d.csv", "d.parquet"):
        report = DataReport()
        assert [one.row for one in read(str(tmp_path / name), report)] == [1]
        assert list(report.rows.values()) == [[0]]


def test_a_missing_file_and_an_unreachable_hub_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read(str(tmp_path / "gone.jsonl"))
    with pytest.raises(DataError, match="does not exist"):
        read("gone.jsonl")
    with pytest.raises(DataError, match="could not be had from the Hub") as caught:
        read("nobody/nothing-of-this-name")
    assert "\n" not in str(caught.value)


# -- fingerprint ----------------------------------------------------------------------------------


def test_the_fingerprint_tells_everything_apart_that_is_read() -> None:
    def of(row: int, *turns: tuple[str, str], keep: int | None = None) -> str:
        return fingerprint([Conversation(row, tuple(Turn(*turn) for turn in turns), keep)])

    base = of(0, ("user", "ab"), ("assistant", "c"))
    assert base == of(0, ("user", "ab"), ("assistant", "c"))
    others = [
        of(1, ("user", "ab"), ("assistant", "c")),
        of(0, ("user", "a"), ("assistant", "bc")),
        of(0, ("system", "ab"), ("assistant", "c")),
        of(0, ("user", "ab"), ("assistant", "c"), keep=2),
        fingerprint([]),
    ]
    assert len({base, *others}) == len(others) + 1
