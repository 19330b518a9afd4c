"""How the actor's weights reach the engines: the seam that every transport implements."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dapo_megatron.config import WeightsConfig
from dapo_megatron.errors import EngineError
from dapo_megatron.measures import Measures
from dapo_megatron.routes import LOOPBACK
from dapo_megatron.weights.verify import Inventory

T = TypeVar("T")

AfterLeader = Callable[[str], object]
"""Waits until the leader has come to the same call (`heartbeat.Peers.after_leader`)."""


LeaderSays = Callable[[str, Any], Any]
"""Returns what the leader gives, once it has come to the same call (`heartbeat.Peers.leader_says`)."""


class Ranks(Protocol):
    """The ranks of a run, as far as a transport needs them (`actor.topology.Topology`)."""

    @property
    def rank(self) -> int: ...

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        ...

    def collect(self, text: str) -> list[str] | None:
        """Return on the leader the text of each rank, None elsewhere. Collective."""
        ...


class WeightReceiver(Protocol):
    """The part of a rollout engine that takes weights (`rollout.engine.Engine`).

    Every method raises EngineError when the engine fails, or takes longer than weights.push_seconds.
    """

    @property
    def name(self) -> str: ...

    @property
    def workers(self) -> int: ...

    @property
    def keeps(self) -> bool:
        """Whether tensors can be left out of a push that it has already."""
        ...

    async def join_group(self, info: dict[str, Any]) -> None:
        """`info`: how to join, in the transport's words, and as "inventory" what every push brings (`Inventory`)."""
        ...

    async def begin_transfer(self) -> None: ...

    async def receive(self, info: dict[str, Any]) -> None:
        """`info`: one bucket, as lists with an entry for each tensor: "tensors", its index in the inventory; "names",
        "dtypes" and "shapes"; and "checksums" (`checksum.checksums`), None where these are not wanted. Where "kept" is
        true, these tensors do not come: they are what the last push has left (only where it `keeps`). Over CUDA IPC,
        also "room", in which the bucket is, and "starts", where each tensor starts in it.

        Through a folder, `info` is all of the push: "folder", a Hugging Face checkpoint, and "checksums" of all
        tensors, in the inventory's order, or None.
        """
        ...

    async def finish_transfer(self, version: int) -> None: ...


async def asked(engine: WeightReceiver, answer: Awaitable[T]) -> T:
    """What an engine answers, or its error, which says whose it is."""
    try:
        return await answer
    except EngineError as error:
        error.engine = engine.name
        raise


class Receivers(Protocol):
    """All engines, and the event loop that they live on."""

    def __iter__(self) -> Iterator[WeightReceiver]: ...

    def run(self, work: Coroutine[Any, Any, T], /) -> T: ...


class Publisher(Protocol):
    """Puts the actor's weights to use in all engines.

    Collective: every rank has one and makes the same calls. Which ranks hand tensors over is the transport's business.
    """

    def push(self, weights: Iterable[tuple[str, Tensor]] | None, version: int) -> Measures:
        """Put `weights` to use in every engine, as `version`. No engine may be generating.

        Args:
            weights: Hugging Face names and whole tensors, in the same order each time. Every rank that has them
                iterates to the end, as often as the others. None on ranks whose replica does not gather.

        Returns:
            On the leader, what was verified, how long that took, and how much was sent.

        Raises:
            EngineError: on the leader, when an engine fails, does not keep up, or has not what was sent.
        """
        ...

    def close(self) -> None:
        """Let go of the engines. Safe to call twice."""
        ...


def open_publisher(
    config: WeightsConfig,
    inventory: Inventory | None,
    receivers: Receivers | None,
    leader_says: LeaderSays = lambda what, value: value,
    *,
    together: Callable[[str], object] = lambda what: None,
    ranks: Ranks | None = None,
    workers: int = 0,
    address: str = LOOPBACK,
    folder: Path | None = None,
    side_files: Callable[[Path], object] = lambda folder: None,
) -> Publisher:
    """The publisher that weights.transport names. Every rank opens one, the leader once the engines answer.

    Args:
        inventory: what every push brings, on the leader.
        receivers: the engines, on the leader; None on other ranks.
        leader_says: what a transport calls on every rank before a collective for which the leader may be late, and to
            tell them all how to go on.
        together: what a transport calls on every rank to wait until all have come there.
        ranks: the ranks of the run, for transports between GPUs.
        workers: of all engines that share GPUs with ranks; the first ranks have one each.
        address: of the leader's machine, at which engines reach it.
        folder: where versions are written, if the transport is one through a folder.
        side_files: writes what belongs to a checkpoint besides tensors, on the leader.

    Raises:
        EngineError: on the leader, when an engine does not take part.
    """
    match config.transport:
        case "gloo" | "nccl":
            from dapo_megatron.weights.broadcast import BroadcastPublisher
            from dapo_megatron.weights.buckets import HOST

            assert config.transport == "gloo" or ranks
            return BroadcastPublisher(
                inventory,
                receivers,
                config.bucket_mib << 20,
                leader_says,
                timeout_seconds=config.push_seconds,
                with_checksums=config.verify != "off",
                address=address,
                delta=config.delta,
                device=ranks.device if ranks and config.transport == "nccl" else HOST,
            )
        case "ipc":
            from dapo_megatron.weights.handles import CudaSharing
            from dapo_megatron.weights.ipc import IpcPublisher

            assert ranks
            return IpcPublisher(
                inventory,
                receivers,
                config.bucket_mib << 20,
                leader_says,
                together,
                ranks,
                CudaSharing(ranks.device) if ranks.rank < workers else None,
                with_checksums=config.verify != "off",
                delta=config.delta,
            )
        case "disk":
            from dapo_megatron.weights.disk import DiskPublisher

            assert folder
            return DiskPublisher(
                inventory,
                receivers,
                folder,
                config.bucket_mib << 20,
                side_files,
                leader_says,
                with_checksums=config.verify != "off",
            )
