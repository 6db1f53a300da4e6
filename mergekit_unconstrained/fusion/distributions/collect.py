"""A teacher's distributions over the responses of a data set, into a store.

Conversations are taken in windows, each sorted by length and cut into batches of at most
`collect_tokens` padded tokens. Windows and batches follow from the data and the number of processes
alone, so a run that was killed makes the rest of exactly the same batches.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.fusion.data.encoding import Encoder
from mergekit_unconstrained.fusion.distributions.store import Store
from mergekit_unconstrained.fusion.distributions.store_format import Header
from mergekit_unconstrained.fusion.distributions.teacher import Teacher, is_out_of_memory
from mergekit_unconstrained.fusion.records import Conversation, Encoded, Record
from mergekit_unconstrained.fusion.settings import FusionSettings
from mergekit_unconstrained.fusion.vocabulary.tables import versions

WINDOW = 512
"""Conversations sorted by length together."""
PART_TOKENS = 1 << 18
PART_SECONDS = 30.0
"""A part is written after so many response tokens or so long, whichever comes first."""


@dataclass
class Collected:
    """How far it is. seconds: of this run; forward_seconds of them in the model."""

    conversations: int = 0
    already: int = 0
    tokens: int = 0
    response_tokens: int = 0
    halvings: int = 0
    seconds: float = 0.0
    forward_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens read by the model, prompts included, padding not."""
        return self.tokens / self.seconds if self.seconds else 0.0


def collect(
    model_folder: Path,
    conversations: Iterable[Conversation],
    encoder: Encoder,
    store: Store,
    settings: FusionSettings,
    *,
    rank: int = 0,
    world: int = 1,
    name: str | None = None,
    progress: Callable[[Collected], object] = lambda _: None,
) -> Collected:
    """Add to the store what it does not hold yet.

    conversations: all of them, the same in every process; those whose place in the sequence is
    rank modulo world are this process's own. store: opened with writer=rank. name: of the model, in
    messages. progress: told after every batch. The model is loaded only if something is missing,
    and freed at the end.

    ModelError when the model gives NaN or infinity (with the row), reads shorter inputs only, or
    does not fit into memory with a single conversation; OutputError when the disk is full.
    """
    run = _Run(Path(model_folder), encoder, store, settings, name or Path(model_folder).name)
    if world == 1:
        store.sweep()
    try:
        for window in _windows(islice(conversations, rank, None, world)):
            run.window(window, progress)
        run.flush()
    finally:
        run.close()
    return run.done


def header_for(
    model: str, encoder: Encoder, settings: FusionSettings, data: str = "", **notes: str
) -> Header:
    """What a store of `collect` says of itself. model: name or hash; data: fingerprint."""
    return Header(
        model=model,
        tokenizer=encoder.table.fingerprint,
        top_k=min(settings.top_k, len(encoder.table.pieces)),
        temperature=settings.temperature,
        data=data,
        notes={**versions(), **notes},
    )


class _Run:
    """One process's pass over its share."""

    def __init__(
        self, folder: Path, encoder: Encoder, store: Store, settings: FusionSettings, name: str
    ) -> None:
        self.done = Collected()
        self._folder = folder
        self._encoder = encoder
        self._store = store
        self._settings = settings
        self._name = name
        self._teacher: Teacher | None = None
        self._records: list[Record] = []
        self._started = time.perf_counter()
        self._flushed = self._started
        self._too_big = 1 << 62  # padded tokens that did not fit into memory

    def window(
        self, conversations: Sequence[Conversation], progress: Callable[[Collected], object]
    ) -> None:
        """Read one window, but for the batches that the store holds."""
        missing = {c.row for c in conversations if c.row not in self._store}
        self.done.already += len(conversations) - len(missing)
        if not missing:
            progress(self._now())
            return
        encoded = self._encoder.encode_many(conversations)
        for batch in _batches(encoded, self._settings.collect_tokens):
            rows = [conversations[i].row for i in batch]
            if missing.isdisjoint(rows):
                continue
            items = [encoded[i] for i in batch]
            records = self._read(rows, items)
            self._keep([record for record in records if record.row in missing], items)
            progress(self._now())

    def flush(self) -> None:
        """Write what was gathered as a part."""
        self._store.write(self._records)
        self._records = []
        self._flushed = time.perf_counter()

    def close(self) -> None:
        """Free the model."""
        self._teacher = None
        _free()

    def _now(self) -> Collected:
        self.done.seconds = time.perf_counter() - self._started
        if self._teacher is not None:
            self.done.forward_seconds = self._teacher.forward_seconds
        return self.done

    def _keep(self, records: list[Record], items: Sequence[Encoded]) -> None:
        self._records += records
        self.done.conversations += len(records)
        self.done.tokens += sum(len(one.ids) for one in items)
        self.done.response_tokens += sum(len(one.positions) for one in items)
        waiting = sum(len(record.tokens) for record in self._records)
        late = time.perf_counter() - self._flushed > PART_SECONDS
        if waiting >= PART_TOKENS or late:
            self.flush()

    def _read(self, rows: Sequence[int], batch: Sequence[Encoded]) -> list[Record]:
        """One batch; when memory runs out, its halves."""
        padded = len(batch) * max(len(one.ids) for one in batch)
        if padded < self._too_big or len(batch) == 1:
            try:
                return self._records_of(rows, batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise ModelError(self._no_memory(rows[0], len(batch[0].ids))) from error
                self._too_big = min(self._too_big, padded)
                self.done.halvings += 1
            _free()  # after the except clause: the error holds the tensors of its frames
        half = len(batch) // 2
        return self._read(rows[:half], batch[:half]) + self._read(rows[half:], batch[half:])

    def _records_of(self, rows: Sequence[int], batch: Sequence[Encoded]) -> list[Record]:
        teacher = self._loaded()
        longest = max(len(one.ids) for one in batch)
        if teacher.limit is not None and longest > teacher.limit:
            row = rows[max(range(len(batch)), key=lambda i: len(batch[i].ids))]
            raise ModelError(
                f"row {row} is {longest} tokens long for {self._name}, which reads "
                f"{teacher.limit} at most: set `max_length: {teacher.limit}` or lower"
            )
        records = []
        for row, one, (topk, nats) in zip(rows, batch, teacher.read(batch), strict=True):
            if not (np.isfinite(topk.log_probs).all() and np.isfinite(topk.gold).all()):
                told = f"{self._name} gives NaN or infinity in row {row} as {teacher.dtype}"
                if teacher.dtype == "float32":
                    raise ModelError(f"{told}: its weights are damaged")
                raise ModelError(
                    f"{told}: its weights are damaged, or they overflow (set `collect_dtype: "
                    "float32`)"
                )
            records.append(Record(row, one.response_ids, one.starts, one.ends, topk, nats))
        return records

    def _loaded(self) -> Teacher:
        if self._teacher is None:
            tokens = len(self._encoder.table.pieces)
            self._teacher = Teacher(self._folder, self._name, tokens, self._settings, own_device())
            self._flushed = time.perf_counter()
        return self._teacher

    def _no_memory(self, row: int, length: int) -> str:
        return (
            f"not enough memory to collect the distributions of {self._name}: even a batch of one "
            f"conversation (row {row}, {length} tokens) does not fit; lower max_length, or set "
            "`collect_dtype: bfloat16` or `device_map: auto`"
        )


def own_device() -> torch.device:
    """This process's accelerator ($LOCAL_RANK counts them), or the CPU."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None:
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
    return torch.device(kind.type, index)


def _windows(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    stream = iter(conversations)
    while window := list(islice(stream, WINDOW)):
        yield window


def _batches(encoded: Sequence[Encoded], budget: int) -> Iterator[list[int]]:
    """Indices of batches, longest conversations first: what does not fit fails at once."""
    lengths: npt.NDArray[np.int64] = np.array([len(one.ids) for one in encoded])
    order = np.argsort(-lengths, kind="stable")
    first = 0
    while first < len(order):
        size = max(1, budget // int(lengths[order[first]]))
        yield [int(i) for i in order[first : first + size]]
        first += size


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
