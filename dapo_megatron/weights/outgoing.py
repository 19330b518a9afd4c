"""Buckets on their way out: made from tensors as they come, without what the engines have."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from dapo_megatron.weights.checksum import checksum, read
from dapo_megatron.weights.delta import Delta, layer_of
from dapo_megatron.weights.verify import Inventory, Tally


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that travel together.

    >>> Bucket(tensors=[0, 1], sums=[-61, 7], place={"room": 0, "starts": [0, 16]}, flats=[]).tensors
    [0, 1]
    """

    tensors: list[int]
    """Their indices in the inventory."""
    sums: list[int] | None
    """Their checksums."""
    place: dict[str, Any]
    """What engines are told of where the bytes are, besides; JSON."""
    flats: list[Tensor]
    """uint8, contiguous: the bytes, piece by piece (`buckets.pieces`); none where engines find them by `place`."""


class Stowage(Protocol):
    """Has the bytes of a bucket until the engines have them."""

    def begin(self, number: int) -> None:
        """Bucket `number` of a pass begins. The engines have all but the one before."""
        ...

    def add(self, tensor: Tensor) -> None:
        """Take a tensor, which comes next in the bucket."""
        ...

    def skip(self, tensor: Tensor) -> None:
        """Take note of one that is not wanted."""
        ...

    def cut(self, count: int) -> None:
        """Only the first `count` tensors that were added are wanted."""
        ...

    def finish(self) -> tuple[dict[str, Any], list[Tensor]]:
        """Return `Bucket.place` and `Bucket.flats`."""
        ...


class Outgoing:
    """Makes buckets, and decides with `Delta` what they hold.

    Args:
        inventory: what a push is made of.
        with_sums: whether checksums are computed, which `Delta` needs.
    """

    def __init__(self, inventory: Inventory, stowage: Stowage, *, with_sums: bool) -> None:
        self._tally, self._stowage, self._with_sums = Tally(inventory), stowage, with_sums
        self._seconds = 0.0

    def take_seconds(self) -> float:
        """Return how long checksums took since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    async def buckets(
        self, weights: Iterator[tuple[int, str, Tensor]], delta: Delta, only: Collection[str] | None = None
    ) -> AsyncGenerator[Bucket]:
        """Yield a bucket for each that `weights` (`buckets.numbered`) come in, with what is to be sent of it, also if
        that is nothing. Weights are taken to the end.

        Whatever else goes on in the event loop has its turn after each tensor.

        Args:
            delta: says what is left out, and is told.
            only: what is sent whatever it says; nothing else is.
        """
        wanted = None if only is None else set(only)
        filling, current = None, -1
        for number, name, tensor in weights:
            if filling is None or number != current:
                if filling:
                    yield self._bucket(filling, delta)
                filling, current = _Filling(all_sure=wanted is not None), number
                self._stowage.begin(number)
            if wanted is None or name in wanted:
                if filling.layer != layer_of(name):
                    self._settle(filling, delta)
                    filling.layer = layer_of(name)
                self._add(filling, name, tensor)
            else:
                self._stowage.skip(tensor)
            del tensor  # not to keep it while the next one is gathered
            await asyncio.sleep(0)
        if filling:
            yield self._bucket(filling, delta)

    def _add(self, filling: _Filling, name: str, tensor: Tensor) -> None:
        (index,) = self._tally.find([(name, tensor)])
        self._stowage.add(tensor)
        filling.tensors.append(index)
        filling.names.append(name)
        if self._with_sums:
            began = time.monotonic()
            filling.coming.append(checksum(tensor))
            self._seconds += time.monotonic() - began

    def _settle(self, filling: _Filling, delta: Delta) -> None:
        """Leave out what is not sure."""
        began = time.monotonic()
        coming = read(filling.coming) if self._with_sums else [0] * (len(filling.names) - len(filling.sums))
        self._seconds += time.monotonic() - began
        filling.coming.clear()
        for value in coming:
            name = filling.names[len(filling.sums)]
            filling.sums.append(value)
            if delta.seen(name, value) or filling.all_sure:
                filling.sure = len(filling.sums)
        delta.leave_out(filling.names[filling.sure :])
        for column in (filling.tensors, filling.names, filling.sums):
            del column[filling.sure :]
        self._stowage.cut(filling.sure)

    def _bucket(self, filling: _Filling, delta: Delta) -> Bucket:
        self._settle(filling, delta)
        place, flats = self._stowage.finish()
        return Bucket(filling.tensors, filling.sums if self._with_sums else None, place, flats)


@dataclass
class _Filling:
    """A bucket that is being made."""

    tensors: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)
    coming: list[Tensor] = field(default_factory=list)
    """Checksums of the last tensors, where they were computed."""
    all_sure: bool = False
    sure: int = 0
    """How many of them are sent in any case; the others are of the layer that is coming by, unchanged so far."""
    layer: str = ""
