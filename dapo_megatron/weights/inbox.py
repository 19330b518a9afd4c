"""A receiver's end of a transport."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dapo_megatron.weights.buckets import HOST, Named, offsets, pieces
from dapo_megatron.weights.group import Group
from dapo_megatron.weights.verify import Arrivals, Has


class Source(Protocol):
    """Where the bytes of buckets come from."""

    def fetch(self, flat: Tensor, sizes: Sequence[int], place: Mapping[str, Any]) -> Callable[[], object]:
        """Begin to bring a bucket.

        Args:
            flat: uint8, where it is wanted, as `buckets.offsets` places its tensors.
            sizes: of each tensor in it, in bytes.
            place: what the leader says of where the bytes are (`outgoing.Bucket.place`).

        Returns:
            What returns once the bucket is there.

        Raises:
            RuntimeError: from either, where it does not come.
        """
        ...


class FromGroup:
    """A `Source`: the leader of a group sends, piece by piece."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def fetch(self, flat: Tensor, sizes: Sequence[int], place: Mapping[str, Any]) -> Callable[[], object]:
        self._group.be_present()
        works = [self._group.transmit(flat[start:end]) for _, start, end in pieces(sizes)]
        return lambda: self._group.wait(works)


class FromRooms:
    """A `Source`: memory of other processes, from which buckets are copied.

    Args:
        rooms: uint8, on the device where buckets are wanted.
    """

    def __init__(self, rooms: Sequence[Tensor]) -> None:
        self._rooms = rooms

    def fetch(self, flat: Tensor, sizes: Sequence[int], place: Mapping[str, Any]) -> Callable[[], object]:
        room, targets = self._rooms[place["room"]], offsets(sizes)[0]
        for source, target, size in zip(place["starts"], targets, sizes, strict=True):
            flat[target : target + size].copy_(room[source : source + size])
        return lambda: self._settle(room.device)

    def _settle(self, device: torch.device) -> None:
        """The leader uses a room again after the answer to a bucket: by then, nothing may be left to be copied."""
        if device != HOST:
            torch.cuda.current_stream(device).synchronize()


class Inbox:
    """Loads a bucket while the next one comes.

    Args:
        load: puts tensors where the engine has its own.
        has: what the engine has by now.
    """

    def __init__(
        self, source: Source, arrivals: Arrivals, load: Callable[[Named], object], has: Callable[[], Has]
    ) -> None:
        self._source, self._arrivals, self._load, self._has = source, arrivals, load, has
        self._last: tuple[Tensor, Sequence[int], Sequence[int] | None] | None = None

    def begin(self) -> None:
        """Forget a push that was cut short."""
        self._last = None

    def receive(
        self, tensors: Sequence[int], sums: Sequence[int] | None, kept: bool, place: Mapping[str, Any] | None = None
    ) -> None:
        """Take part in a bucket, or take note of what is `kept`.

        Raises:
            TransferError: for this bucket or the one before.
        """
        if kept:
            self._arrivals.keep(tensors, sums)
            return
        flat = self._arrivals.allocate(tensors)
        come = self._source.fetch(flat, self._arrivals.sizes(tensors), place or {})
        self._load_last()
        come()
        self._last = flat, tensors, sums

    def finish(self) -> None:
        """Load the last bucket."""
        self._load_last()

    def _load_last(self) -> None:
        if self._last:
            last, self._last = self._last, None
            self._arrivals.load(*last, self._load, self._has)
