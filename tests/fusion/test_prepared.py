"""The data stage: one cut for all models, and held-out conversations that were not trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mergekit_unconstrained.errors import DataError, ModelError
from mergekit_unconstrained.fusion.data.encoding import Encoder
from mergekit_unconstrained.fusion.data.prepared import load_prepared, prepare
from mergekit_unconstrained.fusion.settings import FusionSettings
from mergekit_unconstrained.fusion.vocabulary.tables import ByteTable

Tokenizers = Callable[..., Any]


class Models:
    """Encoders as the data stage asks for them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.table = tokenizer, ByteTable.from_tokenizer(tokenizer)

    def prepared(self, folder: Path, rows: list[str], **settings: Any) -> dict[str, Any]:
        """What the stage tells of these responses; context and name are the model's."""
        chosen = FusionSettings(**{"eval_share": 0.2, "max_length": 64, **settings.pop("of", {})})
        encoder = Encoder(self.tokenizer, self.table, max_length=chosen.max_length, **settings)
        lines = [json.dumps({"instruction": "say it", "response": text}) for text in rows]
        (folder / "d.jsonl").write_text("\n".join(lines))
        models: Any = [SimpleNamespace(encoder=encoder)]
        return prepare(str(folder / "d.jsonl"), chosen, models, folder, lambda _: None)


@pytest.fixture(scope="module")
def models(make_tokenizer: Tokenizers) -> Models:
    return Models(make_tokenizer("byte_level"))


def responses(folder: Path) -> tuple[list[str], list[str]]:
    train, held_out = load_prepared(folder)
    return [c.turns[-1].text for c in train], [c.turns[-1].text for c in held_out]


@pytest.mark.parametrize(("count", "share", "held"), [(50, 0.2, 10), (7, 0.02, 1), (2, 0.9, 1)])
def test_rows_without_a_copy_are_split_by_the_permutation_of_the_seed(
    models: Models, tmp_path: Path, count: int, share: float, held: int
) -> None:
    """As before copies were looked for: recorded figures stay what they are."""
    rows = [f"answer {i}" for i in range(count)]
    found = models.prepared(tmp_path, rows, of={"eval_share": share, "seed": 3})
    expected = np.random.default_rng(3).permutation(count)[:held]
    _, held_out = responses(tmp_path)
    assert sorted(held_out) == sorted(rows[i] for i in expected)
    assert (found["held_out"], found["repeated"]) == (held, 0)


@pytest.mark.parametrize("seed", range(5))
def test_copies_of_a_row_lie_on_one_side(models: Models, tmp_path: Path, seed: int) -> None:
    rows = [f"answer {i % 10}" for i in range(30)] + [f"other {i}" for i in range(5)]
    found = models.prepared(tmp_path, rows, of={"seed": seed})
    train, held_out = responses(tmp_path)
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 35
    assert 5 <= found["held_out"] == len(held_out) <= 7
    assert found["repeated"] == 20


def test_a_row_that_fills_the_data_is_not_held_out_whole(models: Models, tmp_path: Path) -> None:
    assert models.prepared(tmp_path, ["a"] * 9 + ["b"], of={"eval_share": 0.1})["held_out"] == 1
    assert models.prepared(tmp_path, ["a"] * 6 + ["b"] * 4, of={"eval_share": 0.1})["held_out"] == 4
    assert models.prepared(tmp_path, ["a"] * 9)["held_out"] == 0


def test_data_of_which_every_response_is_cut_is_refused(models: Models, tmp_path: Path) -> None:
    long = "the answer is seven apples and two pears, " * 20
    assert models.prepared(tmp_path, [long, "short"])["cut"] == 1
    with pytest.raises(DataError, match=r"every response is longer than `max_length: 64` .*2 of 2"):
        models.prepared(tmp_path, [long, long])


def test_a_model_with_a_shorter_context_is_named_before_it_is_loaded(
    models: Models, tmp_path: Path
) -> None:
    rows = ["short", "the answer is seven apples and two pears, " * 20]
    with pytest.raises(
        ModelError, match=r"row 1 .* is 64 tokens long for brief, .*`max_length: 40`"
    ):
        models.prepared(tmp_path, rows, context=40, name="brief")
    assert models.prepared(tmp_path, rows, context=64)["cut"] == 1
    assert models.prepared(tmp_path, rows[:1], context=40)["conversations"] == 1
