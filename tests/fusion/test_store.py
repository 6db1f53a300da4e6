"""Distributions come back as they were written, whatever happens to the process that writes."""

from __future__ import annotations

import errno
import math
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mergekit_unconstrained.errors import DataError, OutputError
from mergekit_unconstrained.fusion.distributions import store as store_module
from mergekit_unconstrained.fusion.distributions.store import Store
from mergekit_unconstrained.fusion.distributions.store_format import Header
from mergekit_unconstrained.fusion.records import Record, TopK

HEADER = Header("teacher", "fingerprint", 10, notes={"transformers": "5"})


def make_record(row: int, size: int, k: int = 10, vocabulary: int = 49152) -> Record:
    """Zipf's law for the words, and a teacher that is sure of about every second one."""
    random = np.random.default_rng(row)
    sure = random.gamma(2.0, 2.0, (size, 1))
    logits = -sure * np.log(np.arange(1, 400)) + random.normal(0, 0.3, (size, 399))
    logits.sort(axis=1)
    log_probs = logits[:, ::-1] - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    words = np.minimum(random.zipf(1.15, (size, k)), vocabulary) - 1
    lengths = random.integers(1, 7, size)
    gap = np.zeros(size, dtype=np.int64)
    gap[: min(1, size)] = random.integers(0, 3)
    ends = np.cumsum(lengths + gap)
    came = random.integers(0, k, size)
    gold = log_probs[np.arange(size), came]
    topk = TopK(
        ids=words.astype(np.int32),
        log_probs=log_probs[:, :k].astype(np.float32),
        tail=(1 - np.exp(log_probs[:, :k]).sum(axis=1)).clip(0).astype(np.float32),
        gold=gold.astype(np.float32),
    )
    tokens = words[np.arange(size), came].astype(np.int32)
    starts, ends = (ends - lengths).astype(np.int32), ends.astype(np.int32)
    return Record(row, tokens, starts, ends, topk, -float(gold.sum()))


def some(first: int, count: int, k: int = 10) -> list[Record]:
    return [make_record(row, 3 + 37 * row % 90, k) for row in range(first, first + count)]


def same(one: Record, other: Record) -> None:
    for name in ("tokens", "starts", "ends"):
        mine, its = getattr(one, name), getattr(other, name)
        assert mine.dtype == its.dtype == np.int32
        assert mine.tolist() == its.tolist(), name
    assert one.row == other.row
    assert one.nats == other.nats
    assert one.topk.ids.tolist() == other.topk.ids.tolist()
    for name in ("log_probs", "tail", "gold"):
        mine, its = getattr(one.topk, name), getattr(other.topk, name)
        assert mine.dtype == its.dtype == np.float32
        # half a unit of half precision, and what makes the sum 1 again
        np.testing.assert_allclose(mine, its, rtol=2**-11, atol=2**-10, err_msg=name)


# -- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 10, 100])
def test_records_come_back(tmp_path: Path, k: int) -> None:
    records = some(0, 7, k)
    Store(tmp_path / "s", Header("teacher", "f", k)).write(records)
    store = Store(tmp_path / "s")
    assert len(store) == 7
    for one, other in zip(records, store.read(range(7)), strict=True):
        same(one, other)


def test_probabilities_and_tail_sum_to_one_again(tmp_path: Path) -> None:
    Store(tmp_path, HEADER).write(some(0, 9))
    for record in Store(tmp_path):
        total = np.exp(record.topk.log_probs.astype(np.float64)).sum(axis=1) + record.topk.tail
        np.testing.assert_allclose(total, 1.0, atol=2e-6)


def test_extreme_probabilities_stay_finite(tmp_path: Path) -> None:
    topk = TopK(
        ids=np.array([[5, 4_000_000], [1, 2]], dtype=np.int32),
        log_probs=np.array([[0.0, -1e6], [-1e-9, -21.0]], dtype=np.float32),
        tail=np.array([0.0, 1e-9], dtype=np.float32),
        gold=np.array([-1e6, 0.0], dtype=np.float32),
    )
    ends = np.array([4, 70_000], dtype=np.int32)
    starts = np.array([1, 4], dtype=np.int32)
    one = Record(0, ends, starts, ends, topk, 1e6)
    Store(tmp_path, Header("teacher", "f", 2)).write([one])
    (other,) = Store(tmp_path).read([0])
    assert other.topk.ids.tolist() == topk.ids.tolist()
    assert np.isfinite(other.topk.log_probs).all()
    assert np.isfinite(other.topk.gold).all()
    np.testing.assert_allclose(other.topk.log_probs[:, 0], 0, atol=1e-6)
    assert (other.starts.tolist(), other.ends.tolist()) == ([1, 4], [4, 70_000])


def test_an_empty_response_is_a_record_too(tmp_path: Path) -> None:
    Store(tmp_path, HEADER).write([make_record(0, 0), make_record(1, 2)])
    empty, other = Store(tmp_path).read([0, 1])
    assert len(empty.tokens) == len(empty.topk.tail) == 0
    assert math.isnan(empty.bits_per_byte)
    same(make_record(1, 2), other)


def test_a_token_takes_at_most_35_bytes_at_k_10(tmp_path: Path) -> None:
    records = [make_record(row, 120) for row in range(180)]
    Store(tmp_path, HEADER).write(records)
    (part,) = tmp_path.glob("*.parquet")
    assert part.stat().st_size / sum(len(r.tokens) for r in records) < 35


# -- rows and parts -------------------------------------------------------------------------------


def test_any_row_can_be_read_from_any_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "GROUP_TOKENS", 100)  # several row groups in a part
    monkeypatch.setattr(store_module, "_OPEN_GROUPS", 2)
    monkeypatch.setattr(store_module, "_OPEN_PARTS", 1)
    records = some(0, 40)
    store = Store(tmp_path, HEADER)
    for start in range(0, 40, 10):
        store.write(records[start : start + 10][::-1])
    order = np.random.default_rng(0).permutation(40).tolist()
    for reader in (store, Store(tmp_path)):
        for row, record in zip(order, reader.read(order), strict=True):
            same(records[row], record)
    assert store.read([3, 3])[0].row == 3
    assert sorted(r.row for r in store) == store.rows == list(range(40))
    assert 39 in store
    assert 40 not in store
    with pytest.raises(DataError, match="holds no distributions of row 77 and 1 others"):
        store.read([1, 77, 78])


def test_writers_of_several_processes_do_not_disturb_each_other(tmp_path: Path) -> None:
    one, two = Store(tmp_path, HEADER, writer=0), Store(tmp_path, HEADER, writer=1)
    one.write(some(0, 3))
    two.write(some(3, 3))
    one.write(some(6, 3))
    assert one.rows == [0, 1, 2, 6, 7, 8]
    one.refresh()
    assert one.rows == Store(tmp_path).rows == list(range(9))


def test_a_row_written_twice_counts_once(tmp_path: Path) -> None:
    Store(tmp_path, HEADER, writer=0).write(some(0, 3))
    Store(tmp_path, HEADER, writer=1).write(some(2, 2))
    assert [r.row for r in Store(tmp_path)] == Store(tmp_path).rows == [0, 1, 2, 3]


def test_a_store_can_be_handed_to_another_process(tmp_path: Path) -> None:
    store = Store(tmp_path, HEADER)
    store.write(some(0, 5))
    store.read([1])
    same(make_record(4, 3 + 37 * 4 % 90), pickle.loads(pickle.dumps(store)).read([4])[0])


def test_an_empty_store_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path / "none")
    assert store.rows == []
    with pytest.raises(DataError, match="holds no distributions"):
        _ = store.header


# -- what can go wrong ----------------------------------------------------------------------------

WRITE_FOR_EVER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_store import HEADER, some
from pathlib import Path
from mergekit_unconstrained.fusion.distributions.store import Store
store = Store(Path(sys.argv[1]), HEADER)
print("ready", flush=True)
for first in range(len(store), 10 ** 6, 20):
    store.write(some(first, 20))
"""


def test_a_writer_that_is_killed_leaves_whole_parts(tmp_path: Path) -> None:
    folder, here = tmp_path / "s", str(Path(__file__).parent)
    for pause in (0.031, 0.017):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOR_EVER, str(folder), here], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        parts = len(list(folder.glob("part-*")))
        while len(list(folder.glob("part-*"))) < parts + 2:
            time.sleep(0.01)
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        store = Store(folder)
        assert store.rows == list(range(len(store)))
        assert len(store) % 20 == 0
    for record in store:
        assert record.nats == make_record(record.row, 3 + 37 * record.row % 90).nats


def test_leftovers_are_ignored_and_swept(tmp_path: Path) -> None:
    (tmp_path / ".part-003.partial").write_bytes(b"PAR1 half a part")
    store = Store(tmp_path, HEADER)
    store.write(some(0, 2))
    assert store.rows == [0, 1]
    store.sweep()
    assert [p.name for p in tmp_path.iterdir()] == ["part-000-00000.parquet"]


def damage(part: Path, how: str) -> None:
    content = bytearray(part.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    elif how == "flipped":
        content[len(content) // 3] ^= 0xFF
    elif how == "empty":
        content.clear()
    part.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_a_damaged_part_is_named(tmp_path: Path, how: str) -> None:
    store = Store(tmp_path, HEADER)
    store.write(some(0, 30))
    store.write(some(30, 30))
    damage(tmp_path / "part-000-00001.parquet", how)
    with pytest.raises(DataError, match=r"part-000-00001\.parquet is damaged") as caught:
        Store(tmp_path).read(range(60))
    assert "remove it" in str(caught.value)
    (tmp_path / "part-000-00001.parquet").unlink()
    again = Store(tmp_path, HEADER)
    assert again.rows == list(range(30))
    again.write(some(30, 30))
    assert len(Store(tmp_path)) == 60


def test_no_flipped_byte_goes_unnoticed(tmp_path: Path) -> None:
    Store(tmp_path, HEADER).write(some(0, 30))
    part = tmp_path / "part-000-00000.parquet"
    whole = part.read_bytes()
    for place in range(100, len(whole) - 8, len(whole) // 40):
        spoilt = bytearray(whole)
        spoilt[place] ^= 0x10
        part.write_bytes(spoilt)
        try:
            found = list(Store(tmp_path))
        except DataError as error:
            assert part.name in str(error)  # noqa: PT017
            continue
        for one in found:  # a byte that means nothing to the reader
            same(some(0, 30)[one.row], one)
        assert len(found) == 30


def test_a_part_that_vanishes_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path, HEADER)
    store.write(some(0, 3))
    later = Store(tmp_path)
    later._parts.clear()
    (tmp_path / "part-000-00000.parquet").unlink()
    with pytest.raises(DataError, match="is gone"):
        later.read([0])


@pytest.mark.parametrize(
    "change",
    [{"model": "other"}, {"tokenizer": "g"}, {"top_k": 9}, {"temperature": 2.0}, {"data": "x"}],
)
def test_parts_of_other_models_or_settings_are_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    Store(tmp_path, HEADER).write(some(0, 2))
    ((key, value),) = change.items()
    with pytest.raises(DataError, match=rf"part-000-00000\.parquet was made with {key} ") as caught:
        Store(tmp_path, Header(**{**vars(HEADER), **change}))
    assert repr(value) in str(caught.value)


def test_the_header_is_kept_and_notes_need_not_agree(tmp_path: Path) -> None:
    Store(tmp_path, HEADER).write(some(0, 2))
    Store(tmp_path, Header("teacher", "fingerprint", 10, notes={"transformers": "6"}))
    assert Store(tmp_path).header == HEADER
    assert Store(tmp_path).header.notes == {"transformers": "5"}


def test_a_strange_parquet_file_is_no_part(tmp_path: Path) -> None:
    pq.write_table(pa.table({"row": [1]}), tmp_path / "part-000-00000.parquet")
    with pytest.raises(DataError, match="not a part of a store"):
        Store(tmp_path)


def test_a_full_disk_is_a_sentence_and_costs_only_the_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, HEADER)
    store.write(some(0, 2))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(OutputError, match="the disk is full, while storing the distributions"):
            store.write(some(2, 2))
    assert [p.name for p in tmp_path.iterdir()] == ["part-000-00000.parquet"]
    store.write(some(2, 2))
    assert Store(tmp_path).rows == [0, 1, 2, 3]
