"""Tokens as bytes, of real tokenizers and of small ones."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import NAMES, real_tokenizer
from synthetic import encode_real, real_table
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.fusion.vocabulary.tables import ByteTable, fingerprint

TEXTS = [
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
    "def f(x):\n\treturn  x ** 2   # two spaces,  three\n\n\n",
    "Ünïcödé – naïve café, 東京, Москва, ½ of 3.14 €, 😀👩‍👩‍👧 🇫🇷 한국어 ਪੰਜਾਬੀ",
    "  leading, trailing  ",
    "\n",
    "\x00\x01\x7f",
    "龘𠜎",
]


def small(model: Any, **parts: Any) -> Any:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# -- real tokenizers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_a_real_tokenizer_spell_the_text(name: str, text: str) -> None:
    assert encode_real(name, text) is not None


def test_a_byte_that_a_tokenizer_drops_shows_in_its_pieces() -> None:
    """SmolLM2 has no token for 21 of the bytes, and leaves them out without a word."""
    table = real_table("smollm2")
    assert sum(bytes([byte]) not in table.by_bytes for byte in range(256)) == 21
    assert encode_real("smollm2", "a\x04b") is None


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text(max_size=40))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_random_text_is_spelt_or_told_apart(name: str, text: str) -> None:
    """Byte for byte - or the tokenizer changed the text itself (NFC, an unknown byte, a literal
    space marker), which its own decoder shows too."""
    tokenizer, table = real_tokenizer(name), real_table(name)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spelt = b"".join(table.pieces[i] or b"" for i in ids)
    if spelt not in (text.encode(), b" " + text.encode()):
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert decoded != text


@pytest.mark.parametrize(
    ("name", "size", "adds_space", "fallback"),
    [
        ("mistral-v1", 32_000, True, 256),
        ("mistral-v3", 32_768, True, 256),
        ("tekken", 131_072, False, 0),
        ("qwen", 151_646, False, 0),
        ("smollm2", 49_152, False, 0),
    ],
)
def test_tables_have_one_piece_for_each_id(
    name: str, size: int, adds_space: bool, fallback: int
) -> None:
    table = real_table(name)
    assert len(table.pieces) == len(table.lengths) == size
    assert table.adds_space is adds_space
    assert len(table.fallback) == fallback
    assert table.lengths.tolist() == [len(piece or b"") for piece in table.pieces]


def test_sentencepiece_pieces_are_those_of_its_own_library() -> None:
    """The converted tokenizer splits as sentencepiece does, and its pieces are sentencepiece's."""
    from real_tokenizers import sentencepiece_processor

    theirs = sentencepiece_processor("mistral-v1")
    table, tokenizer = real_table("mistral-v1"), real_tokenizer("mistral-v1")
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == theirs.encode(text)
    for i in range(3, len(table.pieces)):
        if theirs.is_byte(i):
            assert table.pieces[i] == bytes([int(theirs.id_to_piece(i)[3:5], 16)])
        else:
            assert table.pieces[i] == theirs.id_to_piece(i).replace("▁", " ").encode()


def test_over_a_thousand_qwen_tokens_are_no_text_alone() -> None:
    def is_text(piece: bytes) -> bool:
        try:
            return bool(piece.decode()) or True
        except UnicodeDecodeError:
            return False

    assert sum(not is_text(piece or b"") for piece in real_table("qwen").pieces) == 1448


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_are_their_literal_text(name: str) -> None:
    tokenizer, table = real_tokenizer(name), real_table(name)
    end = tokenizer.eos_token_id
    assert end in table.special
    assert table.pieces[end] == tokenizer.eos_token.encode()


def test_a_byte_is_looked_up_as_its_literal_piece_before_its_fallback() -> None:
    table = real_table("mistral-v1")
    doubles = [i for i in table.fallback if table.by_bytes[table.pieces[i] or b""] != i]
    assert len(doubles) == 125
    assert table.by_bytes[b"\n"] in table.fallback  # Mistral has no other
    assert table.by_bytes[b"a"] not in table.fallback


# -- first pieces ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_first_piece_is_what_the_tokenizer_itself_begins_a_word_with(name: str) -> None:
    """Against tokenising the word in the middle of a sentence: after `x`, which joins nothing."""
    tokenizer, table = real_tokenizer(name), real_table(name)
    words = [" strawberries", " Antananarivo", " sesquipedalian", " antidisestablishment", " pqzv"]
    for word in words:
        whole = tokenizer("So" + word, add_special_tokens=False)["input_ids"]
        place, at = 0, len(b"So") + table.adds_space
        while at > 0:
            at -= len(table.pieces[whole[place]] or b"")
            place += 1
        assert at == 0
        exact = table.by_bytes.get(word.encode())
        assert table.first_piece(word.encode()) == (whole[place] if exact is None else exact)


def test_the_middle_of_a_word_gets_no_space_before_it() -> None:
    table = real_table("mistral-v1")
    assert table.pieces[table.first_piece(b"ing")] == b"ing"
    assert (table.pieces[table.first_piece(b"zzzingg")] or b"").startswith(b"z")


@pytest.mark.parametrize("name", NAMES)
@given(data=st.binary(min_size=1, max_size=12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_first_piece_begins_the_bytes_whatever_they_are(name: str, data: bytes) -> None:
    table = real_table(name)
    first = table.first_piece(data)
    if first < 0:
        assert data[:1] not in table.by_bytes
    else:
        assert data.startswith(table.pieces[first] or b"?")
        assert first not in table.special


def test_text_that_looks_like_a_special_token_begins_as_text() -> None:
    for name in NAMES:
        table = real_table(name)
        first = table.first_piece(b"<|im_end|>")
        assert (table.pieces[first] or b"").startswith(b"<")
        assert table.first_piece(b"</s>") not in table.special


def test_without_a_segmenter_the_longest_beginning_counts() -> None:
    pieces = (b"a", b"ab", b"abc", b"b", None, b"<end>")
    table = ByteTable(pieces, np.array([1, 2, 3, 1, 0, 5], np.int32), frozenset([5]), False, "")
    assert [table.first_piece(data) for data in (b"abx", b"abcd", b"bb", b"x", b"", b"<end>")] == [
        1,
        2,
        3,
        -1,
        -1,
        -1,
    ]


def test_a_table_survives_being_sent_to_another_process() -> None:
    table = real_table("smollm2")
    copy = pickle.loads(pickle.dumps(table))
    assert copy.pieces == table.pieces
    assert copy.first_piece(b" strawberries") == table.first_piece(b" strawberries")


# -- kinds of tokenizers --------------------------------------------------------------------------


def test_the_tiny_tokenizers_of_these_tests_have_byte_tables(make_tokenizer: Callable) -> None:
    text = "Ünï 東京\n  龍 17"
    for kind in ("byte_level", "gpt2", "metaspace"):
        tokenizer = make_tokenizer(kind)
        table = ByteTable.from_tokenizer(tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        spelt = b"".join(table.pieces[i] or b"" for i in ids)
        assert spelt == (b" " if kind == "metaspace" else b"") + text.encode()
        assert table.adds_space is (kind == "metaspace")


def test_gemma_writes_a_marker_without_putting_one_first() -> None:
    """Its added tokens hold runs of spaces, written with the marker, and plain newlines."""
    entries = ["<pad>", "<eos>", "<0x0A>", "▁▁", "\n\n", "a", "▁", "b", "▁a", "<table>"]
    tokenizer = small(
        models.BPE({token: i for i, token in enumerate(entries)}, [("▁", "a")], byte_fallback=True),
        normalizer=normalizers.Replace(" ", "▁"),
        pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous"),
    )
    tokenizer.add_tokens(["▁▁", "\n\n", "<table>"])
    tokenizer.add_special_tokens({"pad_token": "<pad>", "eos_token": "<eos>"})
    table = ByteTable.from_tokenizer(tokenizer)
    assert table.pieces == (
        *(b"<pad>", b"<eos>", b"\n", b"  ", b"\n\n", b"a", b" ", b"b", b" a", b"<table>"),
    )
    assert not table.adds_space
    assert table.special == {0, 1}
    assert table.by_bytes[b"<table>"] == 9


def test_an_id_without_a_token_stands_for_nothing() -> None:
    tokenizer = small(models.BPE({"a": 0, "b": 3}, []))
    table = ByteTable.from_tokenizer(tokenizer)
    assert table.pieces == (b"a", None, None, b"b")


def test_characters_as_tokens_are_themselves() -> None:
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyzABC ")}
    tokenizer = small(models.WordLevel(letters), pre_tokenizer=pre_tokenizers.Split("", "isolated"))
    table = ByteTable.from_tokenizer(tokenizer)
    assert table.pieces[letters["b"]] == b"b"
    assert table.first_piece(b"bad") == letters["b"]
    assert not table.adds_space


def test_a_unigram_model_with_metaspace_is_understood() -> None:
    tokenizer = small(
        models.Unigram([("<unk>", 0.0), ("▁A", -1.0), ("▁b", -1.0), ("▁a", -2.0)], unk_id=0),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )
    table = ByteTable.from_tokenizer(tokenizer)
    assert table.pieces[1:] == (b" A", b" b", b" a")
    assert table.adds_space


def test_a_byte_level_tokenizer_can_add_a_space_too() -> None:
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for adds in (True, False):
        tokenizer = small(
            models.BPE(alphabet, []),
            pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=adds),
            decoder=decoders.ByteLevel(),
        )
        table = ByteTable.from_tokenizer(tokenizer)
        assert table.adds_space is adds
        assert table.pieces[table.first_piece(b"xy")] == b"x"


WORDS = {"[UNK]": 0, "a": 1, "b": 2, "##b": 3, "A": 4, "zero": 5, "one": 6}


@pytest.mark.parametrize(
    ("model", "parts", "why"),
    [
        (
            models.WordPiece(WORDS, unk_token="[UNK]"),
            {"pre_tokenizer": pre_tokenizers.Whitespace()},
            "WordPiece",
        ),
        (
            models.BPE(WORDS, [], unk_token="[UNK]", end_of_word_suffix="</w>"),
            {"pre_tokenizer": pre_tokenizers.Whitespace()},
            "end of words",
        ),
        (
            models.BPE({"a": 0, "b": 1, "▁": 2, "▁a": 3}, [("▁", "a")]),
            {
                "normalizer": normalizers.Sequence(
                    [normalizers.Lowercase(), normalizers.Replace(" ", "▁")]
                )
            },
            "Lowercase",
        ),
        (
            models.WordLevel(WORDS, unk_token="[UNK]"),
            {"pre_tokenizer": pre_tokenizers.Whitespace()},
            "'A b' becomes the tokens of 'Ab'",
        ),
    ],
)
def test_a_tokenizer_that_forgets_the_text_is_refused_for_every_alignment(
    model: Any, parts: dict[str, Any], why: str
) -> None:
    with pytest.raises(ModelError, match=why) as told:
        ByteTable.from_tokenizer(small(model, **parts))
    assert "can be neither pivot nor source of a fusion, whatever the alignment" in str(told.value)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False
        name_or_path = "models/old"

    with pytest.raises(
        ModelError, match=r"models/old has a slow tokenizer \(Slow\).*tokenizer.json"
    ):
        ByteTable.from_tokenizer(Slow())


# -- fingerprints ---------------------------------------------------------------------------------


def _bpe(
    entries: str = "a b c ab bc", merges: tuple = (("a", "b"), ("b", "c")), **parts: Any
) -> str:
    vocabulary = {token: i for i, token in enumerate(entries.split())}
    return fingerprint(small(models.BPE(vocabulary, list(merges)), **parts))


def test_the_fingerprint_tells_tokenizers_apart() -> None:
    added = small(models.BPE({"a": 0}, []))
    added.add_tokens(["<x>"])
    special = small(models.BPE({"a": 0}, []))
    special.add_special_tokens({"eos_token": "<x>"})
    different = [
        _bpe(),
        _bpe("b a c ab bc"),
        _bpe(merges=(("b", "c"), ("a", "b"))),
        _bpe(merges=(("a", "b"),)),
        _bpe(normalizer=normalizers.NFC()),
        _bpe(pre_tokenizer=pre_tokenizers.Whitespace()),
        fingerprint(small(models.BPE({"a": 0}, []))),
        fingerprint(added),
        fingerprint(special),
    ]
    assert len(set(different)) == len(different)


def test_the_fingerprint_does_not_change_with_use(make_tokenizer: Callable) -> None:
    tokenizer = make_tokenizer("byte_level")
    before = fingerprint(tokenizer)
    tokenizer(["a", "bb b b"], padding=True, truncation=True, max_length=2)
    assert fingerprint(tokenizer) == before
    assert ByteTable.from_tokenizer(tokenizer).fingerprint == before


def test_the_fingerprint_is_the_same_in_another_process(
    make_tokenizer: Callable, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer("metaspace")
    file = tmp_path / "tokenizer.json"
    tokenizer.backend_tokenizer.save(str(file))
    program = (
        "import sys; from types import SimpleNamespace; from tokenizers import Tokenizer\n"
        "from mergekit_unconstrained.fusion.vocabulary.tables import fingerprint\n"
        "backend = Tokenizer.from_file(sys.argv[1])\n"
        "print(fingerprint(SimpleNamespace(is_fast=True, backend_tokenizer=backend)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == [fingerprint(tokenizer)]
