"""How the actor's weights reach the engines: the seam that every transport implements."""

from __future__ import annotations

from collections import deque
from collections.abc import Coroutine, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class WeightReceiver(Protocol):
    """The part of a rollout engine that takes weights. Every method raises EngineError when the engine fails."""

    @property
    def name(self) -> str: ...

    @property
    def workers(self) -> int:
        """Processes that hold the weights."""
        ...

    async def join_group(self, info: dict[str, Any]) -> None: ...

    async def begin_transfer(self) -> None: ...

    async def receive(self, info: dict[str, Any]) -> None: ...

    async def finish_transfer(self, version: int) -> None: ...


class Receivers(Protocol):
    """All engines, and the event loop that they live on."""

    def __iter__(self) -> Iterator[WeightReceiver]: ...

    def run(self, work: Coroutine[Any, Any, T], /) -> T: ...


class Publisher(Protocol):
    """Sends weights to all engines. Lives on the leader; the other ranks `drain`."""

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Put `weights` (Hugging Face names, whole tensors) to use in every engine as `version`.

        Raises:
            EngineError: when an engine fails or does not keep up.
        """
        ...

    def close(self) -> None: ...


def drain(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Take part in an export whose tensors another rank sends: gathering them is a collective."""
    deque(weights, maxlen=0)
