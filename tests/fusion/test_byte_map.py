"""The vocabulary map by bytes."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from real_tokenizers import PAIRS, real_tokenizer
from synthetic import hand_table, real_map, real_table

from mergekit_unconstrained.errors import ModelError, OutputError
from mergekit_unconstrained.fusion.vocabulary import byte_map as module
from mergekit_unconstrained.fusion.vocabulary.byte_map import byte_map, cached_byte_map, map_report
from mergekit_unconstrained.fusion.vocabulary.tables import VocabularyMap


def text(name: str, i: int) -> bytes:
    return real_table(name).pieces[i] or b""


@pytest.mark.parametrize(("source", "pivot"), PAIRS)
def test_every_mapped_token_begins_the_source_token(source: str, pivot: str) -> None:
    mapping = real_map(source, pivot)
    ends = {real_tokenizer(source).eos_token_id}
    assert len(mapping.to_pivot) == len(real_table(source).pieces)
    for i in np.flatnonzero(mapping.to_pivot >= 0).tolist():
        if i in ends:
            continue
        mine, theirs = text(source, i), text(pivot, int(mapping.to_pivot[i]))
        assert mine == theirs if mapping.exact[i] else mine.startswith(theirs)
        assert theirs


@pytest.mark.parametrize(("source", "pivot"), PAIRS)
def test_special_tokens_map_only_end_to_end(source: str, pivot: str) -> None:
    mapping = real_map(source, pivot)
    end = real_tokenizer(source).eos_token_id
    assert mapping.to_pivot[end] == real_tokenizer(pivot).eos_token_id
    others = sorted(real_table(source).special - {end})
    assert (mapping.to_pivot[others] == -1).all()
    words = [i for i in range(len(mapping.to_pivot)) if i not in real_table(source).special]
    assert not set(mapping.to_pivot[words].tolist()) & real_table(pivot).special


def test_all_ends_of_a_source_become_the_one_of_the_pivot() -> None:
    source = hand_table(["a", "<eot>", "<eos>", "<pad>"], special=(1, 2, 3))
    pivot = hand_table(["<end>", "a"], special=(0,))
    mapping = byte_map(source, pivot, frozenset({1, 2, 77}), 0)
    assert mapping.to_pivot.tolist() == [1, 0, 0, -1]
    assert byte_map(source, pivot, frozenset({1, 2}), None).to_pivot.tolist() == [1, -1, -1, -1]


def test_a_qwen_word_becomes_the_first_piece_that_mistral_would_write() -> None:
    """Figures of sentencepiece itself: the pieces of the word inside a sentence."""
    from real_tokenizers import sentencepiece_processor

    theirs = sentencepiece_processor("mistral-v1")
    qwen, mapping = real_table("qwen"), real_map("qwen", "mistral-v1")
    checked = 0
    for word in ("strawberries", "Photoshop", "cryptocurrency", "unbelievable", "Manchester"):
        i = qwen.by_bytes.get(f" {word}".encode())
        if i is not None:
            assert mapping.to_pivot[i] == theirs.encode(word)[0]  # it puts the space before
            checked += 1
    assert checked >= 3


def test_a_literal_piece_is_preferred_to_a_byte_of_the_same_text() -> None:
    mistral, mapping = real_table("mistral-v1"), real_map("qwen", "mistral-v1")
    for letter in b"abcxyzABC0123456789.,":
        i = real_table("qwen").by_bytes[bytes([letter])]
        assert int(mapping.to_pivot[i]) not in mistral.fallback
        assert mapping.exact[i]


def test_a_source_with_the_pivots_tokenizer_keeps_every_id() -> None:
    """Also bytes that have a literal piece besides, and special tokens."""
    mistral = real_table("mistral-v1")
    same = byte_map(mistral, mistral, frozenset({2}), 2)
    assert same.to_pivot.tolist() == list(range(32_000))
    other_end = byte_map(mistral, mistral, frozenset({1}), 2)
    assert (other_end.to_pivot[1], other_end.to_pivot[2]) == (2, -1)


def test_a_large_vocabulary_is_mapped_in_about_a_second() -> None:
    source, pivot = real_table("qwen"), real_table("mistral-v1")
    _ = pivot.by_bytes
    begin = time.process_time()
    byte_map(source, pivot, frozenset(), None)
    assert time.process_time() - begin < 4  # 0.9 s measured; other work may share the core


def test_the_report_counts_what_became_of_the_vocabulary() -> None:
    source = hand_table(["a", "ab", "abc", "q", None, "<end>", "<pad>"], special=(5, 6))
    pivot = hand_table(["</s>", "a", "ab"], special=(0,))
    report = map_report(byte_map(source, pivot, frozenset({5}), 0), source, pivot)
    assert report.tokens == 6
    assert report.exact == pytest.approx(3 / 6)
    assert report.first_piece == pytest.approx(1 / 6)
    assert report.unmapped == pytest.approx(2 / 6)
    assert report.examples == (("abc", "ab"),)


def test_a_map_is_made_once_for_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, pivot = hand_table(["a", "ab", "<e>"], (2,)), hand_table(["a", "<f>"], (1,))
    first = cached_byte_map(tmp_path, source, pivot, frozenset({2}), 1)
    monkeypatch.setattr(module, "byte_map", lambda *_: pytest.fail("made twice"))
    again = cached_byte_map(tmp_path, source, pivot, frozenset({2}), 1)
    assert again.to_pivot.tolist() == first.to_pivot.tolist() == [0, 0, 1]
    assert again.exact.tolist() == first.exact.tolist() == [True, False, True]
    assert (again.kind, again.to_pivot.dtype) == ("bytes", np.int32)
    assert len(list(tmp_path.iterdir())) == 1


def test_other_tokenizers_or_ends_get_another_map(tmp_path: Path) -> None:
    source, pivot = hand_table(["a", "<e>"], (1,)), hand_table(["a", "<f>"], (1,))
    cached_byte_map(tmp_path, source, pivot, frozenset({1}), 1)
    cached_byte_map(tmp_path, source, pivot, frozenset(), 1)
    cached_byte_map(tmp_path, source, pivot, frozenset({1}), None)
    cached_byte_map(tmp_path, pivot, source, frozenset({1}), 1)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_map_is_made_again(tmp_path: Path) -> None:
    source, pivot = hand_table(["a"]), hand_table(["b", "a"])
    cached_byte_map(tmp_path, source, pivot, frozenset(), None)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damage in (b"", b"not a zip", whole[: len(whole) // 2]):
        file.write_bytes(damage)
        with pytest.raises(ModelError, match="remove it"):
            VocabularyMap.load(file)
        assert cached_byte_map(tmp_path, source, pivot, frozenset(), None).to_pivot.tolist() == [1]
        assert file.read_bytes() == whole


def test_a_map_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    mapping = byte_map(hand_table(["a"]), hand_table(["a"]), frozenset(), None)
    with pytest.raises(OutputError, match="cannot write"):
        mapping.save(tmp_path / "file" / "map.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
