"""The way to a device and back; on a CPU what can be seen there, and what a device needs."""

from __future__ import annotations

import pytest
import torch

from mergekit_unconstrained.engine.device import ALIGNED, Lane, Room


def test_on_the_cpu_nothing_is_copied() -> None:
    given = {"a": torch.ones(3), "b": torch.ones(3)}
    seen = []
    result = Lane("cpu").merged(given, lambda there: seen.append(there) or there["a"])
    assert seen[0] is given
    assert result is given["a"]


def test_what_is_left_out_on_a_device_stays_left_out() -> None:
    assert Lane("cpu").merged({"a": torch.ones(3)}, lambda _: None) is None
    assert Lane("meta").merged({"a": torch.ones(3)}, lambda _: None) is None


def test_places_have_the_shapes_and_dtypes_asked_for_and_do_not_overlap() -> None:
    likes = [
        torch.empty(7, 3, dtype=torch.bfloat16),
        torch.empty((), dtype=torch.float64),
        torch.empty(0, 4),
        torch.empty(1000, dtype=torch.float16),
    ]
    room = Room(pinned=False)
    places = room.places(likes)
    for number, (place, like) in enumerate(zip(places, likes, strict=True)):
        assert (place.shape, place.dtype) == (like.shape, like.dtype)
        assert (place.data_ptr() - places[0].data_ptr()) % ALIGNED == 0 or not place.numel()
        place.fill_(number + 1)
    assert all((place == n + 1).all() for n, place in enumerate(places))


def test_room_is_used_again_and_grows_where_it_must() -> None:
    room = Room(pinned=False)
    (first,) = room.places([torch.empty(1000)])
    (second,) = room.places([torch.empty(500)])
    assert second.data_ptr() == first.data_ptr()
    (third,) = room.places([torch.empty(4000)])
    assert third.shape == (4000,)


@pytest.mark.gpu
def test_a_stream_of_its_own_gives_the_cpus_bytes() -> None:
    lane = Lane("cuda")
    for size in (1 << 20, 1 << 10, 3 << 20):  # the room shrinks and grows
        given = {k: torch.randn(size).bfloat16() for k in "abc"}

        def add(there: dict[str, torch.Tensor]) -> torch.Tensor:
            return there["a"] + there["b"] - there["c"]

        found = lane.merged(given, add)  # type: ignore[arg-type]
        assert found is not None
        assert found.device.type == "cpu"
        assert torch.equal(found, add(given))
