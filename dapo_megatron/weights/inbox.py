"""A receiver's end of the gloo transport."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dapo_megatron.weights.buckets import Named
from dapo_megatron.weights.gloo import transmit
from dapo_megatron.weights.verify import Arrivals


class Inbox:
    """Loads a bucket while the next one comes.

    Args:
        load: puts tensors where the engine has its own.
    """

    def __init__(self, group: Any, arrivals: Arrivals, load: Callable[[Named], object]) -> None:
        self._group, self._arrivals, self._load = group, arrivals, load
        self._last: tuple[Tensor, Sequence[int], Sequence[int] | None] | None = None

    def begin(self) -> None:
        """Forget a push that was cut short."""
        self._last = None

    def receive(self, tensors: Sequence[int], sums: Sequence[int] | None, kept: bool) -> None:
        """Take part in a bucket, or take note of what is `kept`.

        Raises:
            TransferError: for this bucket or the one before.
        """
        if kept:
            self._arrivals.keep(tensors, sums)
            return
        flat = self._arrivals.allocate(tensors)
        coming = transmit(self._group, flat)
        self._load_last()
        coming.wait()
        self._last = flat, tensors, sums

    def finish(self) -> None:
        """Load the last bucket."""
        self._load_last()

    def _load_last(self) -> None:
        if self._last:
            last, self._last = self._last, None
            self._load(self._arrivals.unpack(*last))
