from __future__ import annotations

import torch

from dapo_megatron.weights.rooms import Rooms


def test_room_is_used_again_once_nobody_looks_at_it() -> None:
    rooms = Rooms()
    first = rooms.take(100)
    where = first.data_ptr()
    second = rooms.take(100)
    assert second.data_ptr() != where
    part = first[10:20].view(torch.int16)
    del first
    assert rooms.take(100).data_ptr() != where, "a view of it lives"
    assert part.shape == (5,)
    del part
    assert {rooms.take(50).data_ptr() for _ in range(3)} >= {where}
    assert rooms.take(64).shape == (64,)


def test_two_rooms_are_enough_for_one_behind_the_other() -> None:
    rooms = Rooms()
    last = rooms.take(1000)  # a large one comes first
    places = set()
    for _ in range(6):
        room = rooms.take(100)
        places.add(room.data_ptr())
        last = room
    assert len(places) == 2 and last is not None
