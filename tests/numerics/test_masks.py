"""Random lanes: what they depend on, and what not."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from mergekit_unconstrained.numerics import masks
from mergekit_unconstrained.numerics.masks import (
    GAMMA,
    Coins,
    Lanes,
    splitmix64,
    thresholds,
    uniform_lanes,
)

KEY = {"seed": 0, "tensor": "model.layers.0.mlp.up_proj.weight", "model": "org/math"}
N = 200_000
GAMMA_LESS_1 = int(GAMMA) - 1


def lanes(count: int = N, **changes: object) -> np.ndarray:
    return uniform_lanes(torch.Size([count]), **{**KEY, **changes})  # type: ignore[arg-type]


def test_the_same_key_gives_the_same_lanes() -> None:
    assert np.array_equal(lanes(), lanes())
    assert lanes().dtype == np.uint32


def test_the_lanes_are_fixed_for_all_time() -> None:
    """Another generator would change every published merge, so it must not come unnoticed."""
    digest = hashlib.sha256(lanes(1001).astype("<u4").tobytes()).hexdigest()
    assert digest[:16] == "d77ab1dca19bc620"


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"seed": -1}, {"tensor": "lm_head.weight"}, {"model": "org/code"}]
)
def test_every_part_of_the_key_counts(change: dict) -> None:
    differing = float(np.mean(lanes() != lanes(**change)))
    assert differing > 0.999


def test_the_parts_of_the_key_do_not_run_together() -> None:
    assert not np.array_equal(
        lanes(tensor="ab", model="c"),
        lanes(tensor="a", model="bc"),
    )


@pytest.mark.parametrize("shorter", [0, 1, 2, 7, 1000, 99_999])
def test_a_shorter_tensor_gets_a_prefix(shorter: int) -> None:
    assert np.array_equal(lanes(shorter), lanes()[:shorter])


def test_the_shape_does_not_matter_to_an_entry() -> None:
    shaped = uniform_lanes(torch.Size([8, 5, 3]), **KEY)
    assert shaped.shape == (8, 5, 3)
    assert np.array_equal(shaped.reshape(-1), lanes(120))


def test_the_global_generators_are_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = lanes(64)
    torch.manual_seed(2)
    assert np.array_equal(first, lanes(64))
    torch.manual_seed(1)
    lanes(64)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_the_generator_is_splitmix64() -> None:
    """The numbers of its authors' reference implementation for the start 1234567."""
    assert splitmix64(1234567, 1, 5).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(1234567, 3, 2).tolist() == [9817491932198370423, 4593380528125082431]
    assert splitmix64(2**64 - 1, 1, 3).tolist() == splitmix64(GAMMA_LESS_1, 0, 3).tolist()


def test_every_bit_of_a_lane_is_fair() -> None:
    bits = np.unpackbits(lanes().view(np.uint8).reshape(N, 4), axis=1).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / math.sqrt(N)


def test_lanes_are_uniform() -> None:
    counts = np.bincount(lanes() >> 24, minlength=256)
    chi_square = float(((counts - N / 256) ** 2 / (N / 256)).sum())
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("keep", [0.001, 0.1, 1 / 3, 0.5, 0.9, 0.999])
def test_the_kept_fraction_is_within_the_binomial_bound(keep: float) -> None:
    fraction = float(np.mean(lanes() < thresholds(keep)))
    assert abs(fraction - keep) < 5 * math.sqrt(keep * (1 - keep) / N)


def test_two_models_are_kept_independently() -> None:
    first = lanes(model="a") < thresholds(0.3)
    second = lanes(model="b") < thresholds(0.3)
    both = float(np.mean(first & second))
    assert abs(both - 0.09) < 5 * math.sqrt(0.09 * 0.91 / N)
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(N)


def test_neighbouring_entries_are_kept_independently() -> None:
    kept = (lanes() < thresholds(0.3)).astype(float)
    assert abs(np.corrcoef(kept[:-1], kept[1:])[0, 1]) < 5 / math.sqrt(N)


@pytest.mark.parametrize(
    ("keep", "threshold"),
    [(0.0, 0), (-1.0, 0), (1.0, 2**32), (2.0, 2**32), (0.5, 2**31), (2.0**-32, 1), (2.0**-34, 0)],
)
def test_thresholds_are_exact(keep: float, threshold: int) -> None:
    assert int(thresholds(keep)) == threshold


def test_the_ends_keep_nothing_and_everything() -> None:
    assert not (lanes() < thresholds(0.0)).any()
    assert (lanes() < thresholds(1.0)).all()
    # Also where a lane takes its largest value.
    assert (np.array([2**32 - 1], dtype=np.uint32) < thresholds(1.0)).all()


@pytest.mark.parametrize("pieces", [[1000], [1] * 1000, [3, 500, 497], [999, 1], [2, 998]])
def test_lanes_do_not_depend_on_how_a_tensor_is_cut(pieces: list[int]) -> None:
    keys = {"seed": 1, "tensor": "t", "model": "m"}
    whole = uniform_lanes(torch.Size([1000]), **keys)  # type: ignore[arg-type]
    lanes = Lanes(**keys)  # type: ignore[arg-type]
    assert np.array_equal(np.concatenate([lanes.take(n) for n in pieces]), whole)
    coins, at_once = Coins(0.3, **keys), np.empty(1000, np.bool_)  # type: ignore[arg-type]
    tossed = [np.empty(n, np.bool_) for n in pieces]
    for heads in tossed:
        coins.toss(heads)
    Coins(0.3, **keys).toss(at_once)  # type: ignore[arg-type]
    assert np.array_equal(np.concatenate(tossed), at_once)


def heads(keep: float, **changes: object) -> np.ndarray:
    found = np.empty(N, np.bool_)
    Coins(keep, **{**KEY, **changes}).toss(found)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("keep", [0.0, 1e-6, 0.001, 0.1, 1 / 3, 0.5, 0.9, 0.999, 1.0])
def test_coins_have_their_probability(keep: float) -> None:
    fraction = float(np.mean(heads(keep)))
    assert abs(fraction - keep) <= 5 * math.sqrt(keep * (1 - keep) / N)


def test_coins_are_fixed_for_all_time() -> None:
    digest = hashlib.sha256(np.packbits(heads(0.3)).tobytes()).hexdigest()
    assert digest[:16] == "80e57aebefb09cf1"


def test_coins_of_two_models_and_neighbours_are_independent() -> None:
    first, second = heads(0.3), heads(0.3, model="org/code")
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(N)
    for lag in (1, 2, 3, 4, 1024):
        assert abs(np.corrcoef(first[:-lag], first[lag:])[0, 1]) < 5 / math.sqrt(N)


@pytest.mark.parametrize("lane", [0, 1, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("more", [0, 1, 0x1234, 0xFFFFFF])
@pytest.mark.parametrize(
    "threshold", [1, 0x7F000001, 0x80000000, 0x80001234, 0x80001235, 0xFF000000, 0xFFFFFFFF]
)
def test_two_lanes_are_one_of_32_bits(
    lane: int, more: int, threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads exactly where lane * 2^24 + more < threshold; more: the upper bits of its lane."""

    class Fixed:
        def __init__(self, *, model: str, **_: object) -> None:
            self._is_more = model.endswith("more")

        def take(self, count: int) -> np.ndarray:
            if self._is_more:
                return np.full(count, more << 8 | 0xAB, np.uint32)
            return np.full(count, lane, np.uint8)

    monkeypatch.setattr(masks, "Lanes", Fixed)
    found = np.empty(3, np.bool_)
    Coins(threshold / 2**32, **KEY).toss(found)  # type: ignore[arg-type]
    assert found.tolist() == [lane * 2**24 + more < threshold] * 3
