"""The speed of every alignment beside FuseChat's published algorithm (`make bench`).

Prints a table and asserts nothing about time. All figures are tokens of the pivot per CPU second of
one thread; real tokenizers (pivot Mistral v1, source Qwen), texts of reasoning-gym, synthetic top
10. MERGEKIT_UNCONSTRAINED_BENCH_TEXTS says how many texts (200, about 100,000 tokens);
the reference reads the first of them only.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fusechat_reference
import numpy as np
import pytest

# The real tokenizers and the fixture of the fusion tests.
sys.path.append(str(Path(__file__).parents[1] / "fusion"))

import parity
from real_tokenizers import real_tokenizer

from mergekit_unconstrained.fusion.alignment.by_bytes import ByteAligner
from mergekit_unconstrained.fusion.alignment.dtw import sequence_costs, warp
from mergekit_unconstrained.fusion.alignment.quality import measure
from mergekit_unconstrained.fusion.alignment.warping import TokenWarper, WarpingAligner
from mergekit_unconstrained.fusion.data.encoding import Encoder
from mergekit_unconstrained.fusion.distributions.store import Store
from mergekit_unconstrained.fusion.distributions.store_format import Header
from mergekit_unconstrained.fusion.records import Conversation, Encoded, Record, TopK, Turn
from mergekit_unconstrained.fusion.vocabulary.byte_map import byte_map
from mergekit_unconstrained.fusion.vocabulary.published_maps import (
    PairCounts,
    exact_map,
    mined_map,
    ms_map,
)
from mergekit_unconstrained.fusion.vocabulary.tables import ByteTable, VocabularyMap
from mergekit_unconstrained.fusion.vocabulary.token_texts import TokenTexts

TEXTS = int(os.environ.get("MERGEKIT_UNCONSTRAINED_BENCH_TEXTS", "200"))
REFERENCE_TEXTS = 6
REPEATS = 9
"""Of what takes under a second."""
CHARACTERS = 1800
K = 10


# -- the reference is FuseChat's algorithm --------------------------------------------------------


@pytest.mark.parametrize(
    "case", [c for c in parity.cases() if (c.style, c.kind) == ("fusechat", "ms")][:1]
)
def test_the_reference_gives_what_fusechat_gave(case: parity.Case) -> None:
    source, pivot = parity.source_texts(), parity.pivot_texts()
    found = fusechat_reference.align(
        case.source_ids.tolist(),
        case.pivot_ids.tolist(),
        case.topk_ids.tolist(),
        case.topk_logits.tolist(),
        source_raw=source.respelled(pivot.marker),
        source_decoded=source.decoded,
        pivot_decoded=pivot.decoded,
        pivot_vocabulary=parity.fixture()["pivot_vocabulary_hits"],
        statistics=parity.published_ms().tolist(),
    )
    assert [ids for ids, _ in found] == case.expected_ids
    assert [logits for _, logits in found] == case.expected_logits


@pytest.mark.parametrize("left_first", [False, True])
def test_the_reference_warps_as_the_quick_one(left_first: bool) -> None:
    rng = np.random.default_rng(0)
    texts = ["a", "b", "ab", "abc", "", "cab", "bb"]
    for _ in range(60):
        source, pivot = (rng.integers(0, 7, rng.integers(1, 12)).astype(np.int32) for _ in "sp")
        first, last = warp(sequence_costs(source, pivot, texts, texts), left_first=left_first)
        slow = fusechat_reference.paired(
            [texts[i] for i in source], [texts[i] for i in pivot], left_first=left_first
        )
        assert slow == [list(range(a, b + 1)) for a, b in zip(first, last, strict=True)]


# -- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """A tokenizer in all its forms."""

    tokenizer: Any
    table: ByteTable
    texts: TokenTexts

    @classmethod
    def of(cls, name: str) -> Side:
        tokenizer = real_tokenizer(name)
        table = ByteTable.from_tokenizer(tokenizer)
        return cls(tokenizer, table, TokenTexts.from_tokenizer(tokenizer, table))

    def read(self, text: str) -> Encoded:
        """The whole text as one response; a space that the tokenizer adds covers no byte."""
        ids = np.array(self.tokenizer(text, add_special_tokens=False).input_ids, np.int32)
        ends = np.cumsum(self.table.lengths[ids]) - int(self.table.adds_space)
        size = len(text.encode())
        assert ends[-1] == size
        starts = np.concatenate([[0], ends[:-1]])
        positions = np.arange(1, len(ids) + 1, dtype=np.int32)
        whole = np.concatenate([[1], ids]).astype(np.int32)
        return Encoded(whole, positions, starts.astype(np.int32), ends.astype(np.int32), size)


def make_texts(count: int) -> list[str]:
    """Worked problems of several generators, joined to about CHARACTERS each."""
    import reasoning_gym

    names = ["gsm_symbolic", "family_relationships", "leg_counting", "simple_equations"]
    entries = [iter(reasoning_gym.create_dataset(name, size=20 * count, seed=0)) for name in names]
    texts = []
    for _ in range(count):
        text = ""
        while len(text) < CHARACTERS:
            for generator in entries:
                entry = next(generator)
                text += f"Question: {entry['question']}\nAnswer: {entry['answer']}\n\n"
        texts.append(text[:CHARACTERS].strip())
    return texts


def synthetic(rng: np.random.Generator, tokens: np.ndarray, size: int) -> TopK:
    """The token that comes with the largest probability, K - 1 others of any kind after it."""
    r = len(tokens)
    ids = rng.integers(0, size, (r, K)).astype(np.int32)
    ids[:, 0] = tokens
    probs = np.sort(rng.dirichlet(np.full(K + 1, 0.5), r), axis=1)[:, ::-1].astype(np.float32)
    logs = np.log(np.maximum(probs, 1e-8))
    return TopK(ids, logs[:, :K], probs[:, K], logs[:, 0])


def make_record(encoded: Encoded, topk: TopK) -> Record:
    return Record(0, encoded.response_ids, encoded.starts, encoded.ends, topk, 1.0)


def timed(work: Callable[[], object], repeats: int) -> float:
    """Median CPU seconds."""
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds)


def reference(
    records: Sequence[Record],
    encoded: Sequence[Encoded],
    pivot: Side,
    source: Side,
    statistics_map: Sequence[int],
) -> None:
    """The published algorithm on some of the texts."""
    raw = source.texts.respelled(pivot.texts.marker)
    vocabulary = {token: i for i, token in enumerate(pivot.texts.raw)}
    for record, one in zip(records, encoded, strict=True):
        fusechat_reference.align(
            record.tokens.tolist(),
            one.response_ids.tolist(),
            record.topk.ids.tolist(),
            record.topk.log_probs.tolist(),
            source_raw=raw,
            source_decoded=source.texts.decoded,
            pivot_decoded=pivot.texts.decoded,
            pivot_vocabulary=vocabulary,
            statistics=statistics_map,
        )


def quality(aligner: Any, records: Sequence[Record], encoded: Sequence[Encoded]) -> str:
    """Shares: positions whose distribution comes from the source; of those, where the source had
    read another prefix (bytes: none, by construction) and where its next token becomes the
    pivot's."""
    report = measure(records, encoded, aligner)
    wrong = 0.0
    if isinstance(aligner, WarpingAligner):
        rows = [aligner.rows(*pair) for pair in zip(records, encoded, strict=True)]
        shifted = [
            (record.starts[row] != one.starts)[row >= 0]
            for record, row, one in zip(records, rows, encoded, strict=True)
        ]
        wrong = float(np.concatenate(shifted).mean())
    return f"{report.coverage:14.1%}{wrong:14.1%}{report.all.label_consistency:14.1%}"


Maps = dict[tuple[str, bool], VocabularyMap]
"""By style and whether with the published defects."""


def make_aligners(source: Side, pivot: Side, em: Maps, mined: Maps, ms: Maps) -> dict[str, Any]:
    """Every alignment by its name in the table."""
    aligners: dict[str, Any] = {
        f"dtw_{style}, {kind}{', defects' * defects}": WarpingAligner(
            source.texts, pivot.texts, vocabulary, style=style, published_defects=defects
        )
        for kind, maps in (("ms", ms), ("mined", mined), ("em", em))
        for (style, defects), vocabulary in maps.items()
    }
    by_bytes = byte_map(source.table, pivot.table, frozenset(), None)
    aligners["bytes"] = ByteAligner(source.table, pivot.table, by_bytes)
    aligners["bytes, shared only"] = ByteAligner(
        source.table, pivot.table, by_bytes, inside=False, chain=False
    )
    return aligners


@pytest.mark.bench
def test_alignment(capsys: pytest.CaptureFixture) -> None:
    pivot, source = Side.of("mistral-v1"), Side.of("qwen")
    rng = np.random.default_rng(0)
    texts = make_texts(TEXTS)
    encoded = [pivot.read(text) for text in texts]
    records = [
        make_record(one, synthetic(rng, one.response_ids, len(source.texts.raw)))
        for one in (source.read(text) for text in texts)
    ]
    pair = source.texts, pivot.texts
    phi: Maps = {}
    em: Maps = {}
    for defects in (True, False):
        counts = PairCounts(TokenWarper(*pair, style="fusechat", published_defects=defects))
        count = timed(lambda counts=counts: counts.add_corpus(records, encoded), 1)
        phi["fusechat", defects] = ms_map(*pair, counts, published_defects=defects)
        for style in ("fusechat", "fusellm"):
            em[style, defects] = exact_map(*pair, published_defects=defects)
    begin = time.process_time()
    nearest = mined_map(*pair)
    mining = time.process_time() - begin
    mined: Maps = {(style, False): nearest for style in ("fusechat", "fusellm")}
    mined["fusellm", True] = nearest  # there ends of texts are all that differs: none is here
    mined["fusechat", True] = mined_map(*pair, style="fusechat", published_defects=True)
    tokens = sum(len(one.positions) for one in encoded)
    published = phi["fusechat", True].to_pivot.tolist()
    few = REFERENCE_TEXTS
    slow = timed(lambda: reference(records[:few], encoded[:few], pivot, source, published), 1)
    speed = sum(len(one.positions) for one in encoded[:few]) / slow
    lines = [
        f"alignment and mapping, {TEXTS} texts, {tokens:,} pivot tokens, k = {K}, one thread",
        f"{'':32} {'tokens / CPU s':>15} {'times':>8}{'from source':>14}{'wrong prefix':>14}"
        f"{'same label':>14}",
        f"{'published algorithm, plain':32} {speed:15,.0f} {1:8.1f}",
    ]
    for name, aligner in make_aligners(source, pivot, em, mined, phi).items():
        repeats = 1 if isinstance(aligner, WarpingAligner) else REPEATS
        seconds = timed(lambda aligner=aligner: aligner.align(records, encoded), repeats)
        lines.append(
            f"{name:32} {tokens / seconds:15,.0f} {tokens / seconds / speed:8.1f} "
            f"{quality(aligner, records, encoded)}"
        )
    lines.append(f"{'counting pairs for ms':32} {tokens / count:15,.0f}")
    sizes = f"{len(source.texts.raw):,} x {len(pivot.texts.raw):,}"
    lines.append(f"mined map, {sizes}: {mining:.0f} s")
    with capsys.disabled():
        print("\n" + "\n".join(lines))


@pytest.mark.bench
def test_end_to_end(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """Both tokenizers read the conversations, a source's store is written, read and aligned."""
    pivot, source = Side.of("mistral-v1"), Side.of("qwen")
    rng = np.random.default_rng(0)
    conversations = [
        Conversation(i, (Turn("user", "Go on."), Turn("assistant", text)))
        for i, text in enumerate(make_texts(TEXTS))
    ]
    encoders = [Encoder(side.tokenizer, side.table) for side in (source, pivot)]
    records = [
        dataclasses.replace(
            make_record(one, synthetic(rng, one.response_ids, len(source.texts.raw))), row=i
        )
        for i, one in enumerate(encoders[0].encode_many(conversations))
    ]
    by_bytes = byte_map(source.table, pivot.table, frozenset(), None)
    aligner = ByteAligner(source.table, pivot.table, by_bytes)
    spent: dict[str, list[float]] = {}

    def step(name: str, work: Callable[[], Any]) -> Any:
        begin = time.process_time()
        found = work()
        spent.setdefault(name, []).append(time.process_time() - begin)
        return found

    for repeat in range(REPEATS):
        step("tokenise, source", lambda: encoders[0].encode_many(conversations))
        encoded = step("tokenise, pivot", lambda: encoders[1].encode_many(conversations))
        store = Store(tmp_path / str(repeat), Header("model", "tokenizer", K))
        step("store", lambda store=store: store.write(records))
        back = step("read", lambda store=store: store.read(store.rows))
        step("align", lambda back=back, encoded=encoded: aligner.align(back, encoded))
    tokens = sum(len(one.positions) for one in encoded)
    lines = [f"end to end, {tokens:,} pivot tokens, tokens / CPU s, one thread"]
    median = {name: statistics.median(seconds) for name, seconds in spent.items()}
    for name, seconds in median.items():
        lines.append(f"{name:32} {tokens / seconds:15,.0f}")
    lines.append(f"{'all of it':32} {tokens / sum(median.values()):15,.0f}")
    size = sum(f.stat().st_size for f in (tmp_path / "0").rglob("*") if f.is_file())
    lines.append(f"{size / sum(len(r.tokens) for r in records):.1f} bytes a source token")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
