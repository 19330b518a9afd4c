"""Weights by CUDA IPC: each rank puts the weights where the engine worker on its own GPU copies them from.

Only handles to that memory travel, once. In a push, for each bucket, on every rank:

1. Its weights are gathered, in all replicas.
2. The leader says that the engines have copied the bucket but one before: its room is free.
3. Ranks with an engine worker on their GPU copy the weights into that room.
4. When all have, the leader announces the bucket; a worker copies it into memory of its own, and answers.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from dapo_megatron.measures import Measures
from dapo_megatron.weights.buckets import offsets, put
from dapo_megatron.weights.gathering import Gathered, Gathering
from dapo_megatron.weights.handles import Sharing
from dapo_megatron.weights.outgoing import Bucket, Outgoing
from dapo_megatron.weights.publish import LeaderSays, Ranks, Receivers, WeightReceiver
from dapo_megatron.weights.sender import Sender
from dapo_megatron.weights.verify import Inventory


class IpcPublisher:
    """A `Publisher` that every rank with an engine worker on its GPU sends to that one. All replicas gather.

    Args:
        inventory: what every push brings, on the leader.
        receivers: the engines, on the leader; None on other ranks. All are on this machine.
        bucket_bytes: of what is gathered and sent together. Each rank that sends has two rooms of this size, or of that
            of the largest tensor, for as long as the run lasts.
        leader_says: see `Gathering`.
        together: see `heartbeat.Peers.together`.
        ranks: the ranks of the run.
        sharing: makes rooms on this rank's GPU; None where no engine worker is.
        with_checksums: whether engines get checksums to compare what has arrived with.
        delta: whether layers that the engines have are left out.

    Raises:
        EngineError: when an engine does not open the rooms.
    """

    def __init__(
        self,
        inventory: Inventory | None,
        receivers: Receivers | None,
        bucket_bytes: int,
        leader_says: LeaderSays,
        together: Callable[[str], object],
        ranks: Ranks,
        sharing: Sharing | None,
        *,
        with_checksums: bool = True,
        delta: bool = True,
    ) -> None:
        self._gathering = Gathering(bucket_bytes, leader_says, self._stow)
        self._leader_says, self._together, self._sharing = leader_says, together, sharing
        largest = max(inventory.sizes) if inventory else 0
        room_bytes: int = leader_says("size of the rooms for weights", max(bucket_bytes, largest))
        made = [sharing.make(room_bytes) for _ in range(2)] if sharing else []
        self._rooms = [room for room, _ in made]
        told = ranks.collect(json.dumps([handle for _, handle in made]))
        self._sender = None
        if receivers is not None:
            assert inventory is not None and told is not None
            outgoing = Outgoing(inventory, _Places(), with_sums=with_checksums or delta)
            carrier = _Handles([handles for text in told if (handles := json.loads(text))])
            self._sender = Sender(inventory, outgoing, carrier, receivers, with_checksums=with_checksums, delta=delta)

    def push(self, weights: Iterable[tuple[str, Tensor]] | None, version: int) -> Measures:
        assert weights is not None, "over CUDA IPC, every replica gathers"
        if self._sender:
            with self._gathering.leading(weights) as passes:
                return self._sender.send(passes, version)
        self._gathering.follow(weights)
        return {}

    def close(self) -> None:
        if self._sender:
            self._sender.close()

    def _stow(self, gathered: Gathered) -> Gathered:
        """Pass on what is gathered; once it has been seen, it is also in the room of its bucket.

        Whoever iterates comes back for the next tensor. The first one of a bucket tells that the one before is whole:
        until then, the leader announces that one, and waits until the engines have copied the one before it.
        """
        current, sizes = -1, []
        for number, name, tensor in gathered:
            begins = number != current
            if begins:
                self._stowed(sizes)
                current, sizes = number, []
            yield number, name, tensor
            if begins:
                self._leader_says("room for weights", None)
            sizes.append(tensor.nbytes)
            if self._rooms:
                put(tensor, self._rooms[_room_of(number)], offsets(sizes)[0][-1])
            del tensor
        self._stowed(sizes)

    def _stowed(self, sizes: Sequence[int]) -> None:
        """A bucket is whole, on all ranks."""
        if sizes:
            if self._sharing:
                self._sharing.settle()
            self._together("bucket of weights")


def _room_of(number: int) -> int:
    """Which room a bucket of a pass is in."""
    return number % 2


class _Places:
    """A `Stowage` that only knows where the bytes are in a room, which has all of a bucket, also what is left out."""

    def __init__(self) -> None:
        self._room = 0
        self._sizes: list[int] = []
        self._added: list[int] = []
        """Which of these may be sent."""

    def begin(self, number: int) -> None:
        self._room = _room_of(number)
        self._sizes, self._added = [], []

    def add(self, tensor: Tensor) -> None:
        self._added.append(len(self._sizes))
        self._sizes.append(tensor.nbytes)

    def skip(self, tensor: Tensor) -> None:
        self._sizes.append(tensor.nbytes)

    def cut(self, count: int) -> None:
        del self._added[count:]

    def finish(self) -> tuple[dict[str, Any], list[Tensor]]:
        starts, _ = offsets(self._sizes)
        return {"room": self._room, "starts": [starts[index] for index in self._added]}, []


class _Handles:
    """A `Carrier`: engines copy for themselves.

    Args:
        rooms: the handles of the rooms of each rank that has some.
    """

    def __init__(self, rooms: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        self._rooms = rooms

    def connect(self, engines: Sequence[WeightReceiver]) -> tuple[list[dict[str, Any]], Awaitable[Any]]:
        return [{"rooms": self._rooms} for _ in engines], _nothing()

    async def carry(self, bucket: Bucket) -> None: ...

    def close(self) -> None: ...


async def _nothing() -> None: ...
