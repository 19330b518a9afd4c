"""Buckets on their way out: made from tensors as they come, without what the engines have."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dapo_megatron.weights.buckets import offsets, put
from dapo_megatron.weights.checksum import checksums
from dapo_megatron.weights.delta import Delta, layer_of
from dapo_megatron.weights.verify import Inventory, Tally


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that travel together.

    >>> Bucket(tensors=[0, 1], sums=[-61, 7], flat=torch.zeros(208, dtype=torch.uint8)).tensors
    [0, 1]
    """

    tensors: list[int]
    """Their indices in the inventory."""
    sums: list[int] | None
    """Their checksums."""
    flat: Tensor
    """uint8 on CPU, their bytes as `buckets.offsets` places them."""


class Outgoing:
    """Makes buckets in two rooms, which take turns: one is on its way while the other is filled.

    Args:
        inventory: what a push is made of.
        bucket_bytes: size of a room. A larger tensor travels from where it is.
        with_sums: whether checksums are computed, which `Delta` needs.
    """

    def __init__(self, inventory: Inventory, bucket_bytes: int, *, with_sums: bool) -> None:
        self._tally, self._bucket_bytes, self._with_sums = Tally(inventory), bucket_bytes, with_sums
        self._rooms: list[Tensor] = []
        self._seconds = 0.0

    def take_seconds(self) -> float:
        """Return how long checksums took since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    async def buckets(
        self, weights: Iterator[tuple[int, str, Tensor]], delta: Delta, only: Collection[str] | None = None
    ) -> AsyncGenerator[Bucket]:
        """Yield what is to be sent of `weights` (`buckets.numbered`), which are taken to the end.

        Whatever else goes on in the event loop has its turn after each tensor.

        Args:
            delta: says what is left out, and is told.
            only: what is sent whatever it says; nothing else is.
        """
        wanted = None if only is None else set(only)
        filling, current = _Filling(), 0
        for number, name, tensor in weights:
            if number != current:
                filling.settle(delta)
                if filling.tensors:
                    yield self._bucket(filling)
                filling, current = _Filling(), number
            if wanted is None or name in wanted:
                if filling.layer != layer_of(name):
                    filling.settle(delta)
                    filling.layer = layer_of(name)
                self._add(filling, name, tensor)
                if delta.seen(name, filling.sums[-1]) or wanted is not None:
                    filling.sure = len(filling.tensors)
            del tensor  # not to keep it while the next one is gathered
            await asyncio.sleep(0)
        filling.settle(delta)
        if filling.tensors:
            yield self._bucket(filling)

    def _add(self, filling: _Filling, name: str, tensor: Tensor) -> None:
        (index,) = self._tally.find([(name, tensor)])
        start = offsets([filling.ends[-1], 0])[0][1] if filling.ends else 0
        if tensor.nbytes > self._bucket_bytes:
            filling.own = tensor.detach().contiguous().view(-1).view(torch.uint8)
        else:
            put(tensor, self._room(tensor.device), start)
        checksum = 0
        if self._with_sums:
            began = time.monotonic()
            (checksum,) = checksums([tensor])
            self._seconds += time.monotonic() - began
        filling.tensors.append(index)
        filling.names.append(name)
        filling.sums.append(checksum)
        filling.ends.append(start + tensor.nbytes)

    def _room(self, device: torch.device) -> Tensor:
        if not self._rooms:
            self._rooms = [torch.empty(self._bucket_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        return self._rooms[0]

    def _bucket(self, filling: _Filling) -> Bucket:
        flat = filling.own if filling.own is not None else self._rooms[0][: filling.ends[-1]]
        self._rooms.reverse()
        return Bucket(filling.tensors, filling.sums if self._with_sums else None, flat.cpu())


@dataclass
class _Filling:
    """A bucket that is being made."""

    tensors: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """Where each ends in the flat bucket."""
    sure: int = 0
    """How many of them are sent in any case; the others are of the layer that is coming by, unchanged so far."""
    layer: str = ""
    own: Tensor | None = None
    """The bytes of the only tensor, where that is larger than a room."""

    def settle(self, delta: Delta) -> None:
        """Leave out what is not sure."""
        delta.leave_out(self.names[self.sure :])
        for column in (self.tensors, self.names, self.sums, self.ends):
            del column[self.sure :]
