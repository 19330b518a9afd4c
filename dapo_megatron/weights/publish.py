"""How the actor's weights reach the engines: the seam that every transport implements."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from torch import Tensor

from dapo_megatron.config import WeightsConfig

T = TypeVar("T")


class WeightReceiver(Protocol):
    """The part of a rollout engine that takes weights (`rollout.engine.Engine`).

    Every method raises EngineError when the engine fails.
    """

    @property
    def name(self) -> str: ...

    @property
    def workers(self) -> int: ...

    async def join_group(self, info: dict[str, Any]) -> None: ...

    async def begin_transfer(self) -> None: ...

    async def receive(self, info: dict[str, Any]) -> None: ...

    async def finish_transfer(self, version: int) -> None: ...


class Receivers(Protocol):
    """All engines, and the event loop that they live on."""

    def __iter__(self) -> Iterator[WeightReceiver]: ...

    def run(self, work: Coroutine[Any, Any, T], /) -> T: ...


class Publisher(Protocol):
    """Puts the actor's weights to use in all engines.

    Collective: every rank has one and makes the same calls. Which ranks hand tensors over is the transport's business.
    """

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Put `weights` to use in every engine, as `version`. No engine may be generating.

        Args:
            weights: Hugging Face names and whole tensors, the same on every rank. Every rank iterates to the end.

        Raises:
            EngineError: on the leader, when an engine fails or does not keep up.
        """
        ...

    def close(self) -> None:
        """Let go of the engines. Safe to call twice."""
        ...


def open_publisher(config: WeightsConfig, receivers: Receivers | None) -> Publisher:
    """The publisher that weights.transport names. Collective, once the engines answer.

    A transport may have ranks wait for the leader here only with a limit: it fails where an engine does.

    Args:
        receivers: the engines, on the leader; None on other ranks.

    Raises:
        EngineError: on the leader, when an engine does not take part.
    """
    match config.transport:
        case "gloo":
            from dapo_megatron.weights.gloo import GlooPublisher

            return GlooPublisher(receivers, config.bucket_mib << 20)
