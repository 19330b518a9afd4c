"""Weights by broadcast: one group holds the leader (rank 0) and all workers of all engines, over gloo or NCCL."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dapo_megatron.measures import Measures
from dapo_megatron.routes import LOOPBACK
from dapo_megatron.weights.buckets import HOST, bytes_of, is_large, offsets, pieces, put
from dapo_megatron.weights.gathering import Gathering
from dapo_megatron.weights.group import Group, join_group
from dapo_megatron.weights.outgoing import Bucket, Outgoing
from dapo_megatron.weights.publish import LeaderSays, Receivers, WeightReceiver
from dapo_megatron.weights.sender import Sender
from dapo_megatron.weights.verify import Inventory


class BroadcastPublisher:
    """A `Publisher` whose leader sends all weights; the other ranks only take part in gathering them.

    Args:
        inventory: what every push brings, on the leader.
        receivers: the engines, on the leader; None on other ranks.
        bucket_bytes: of what is gathered and sent together; one larger tensor is a bucket, too. The leader has two at a
            time, one on its way and one that is made.
        leader_says: called on every rank before the weights of a bucket are gathered, while which the leader may be
            busy with the one before, and once they all were: whether that was the end.
        timeout_seconds: limit on connecting and on each bucket. Engines have their own (`WeightReceiver`).
        with_checksums: whether engines get checksums to compare what has arrived with.
        delta: whether layers that the engines have are left out.
        address: of this machine, at which engines reach it, and the only one that is listened at.
        device: of the leader, from which bytes leave: on the host, over gloo, otherwise over NCCL.

    Raises:
        EngineError: when an engine does not join the group.
    """

    def __init__(
        self,
        inventory: Inventory | None,
        receivers: Receivers | None,
        bucket_bytes: int,
        leader_says: LeaderSays = lambda what, value: value,
        *,
        timeout_seconds: float,
        with_checksums: bool = True,
        delta: bool = True,
        address: str = LOOPBACK,
        device: torch.device = HOST,
    ) -> None:
        self._gathering = Gathering(bucket_bytes, leader_says)
        self._sender = None
        if receivers is not None:
            assert inventory is not None
            outgoing = Outgoing(inventory, TwoRooms(bucket_bytes, device), with_sums=with_checksums or delta)
            carrier = _Broadcast(address, device, timeout_seconds)
            self._sender = Sender(inventory, outgoing, carrier, receivers, with_checksums=with_checksums, delta=delta)

    def push(self, weights: Iterable[tuple[str, Tensor]] | None, version: int) -> Measures:
        if self._sender:
            assert weights is not None
            with self._gathering.leading(weights) as passes:
                return self._sender.send(passes, version)
        self._gathering.follow(weights)
        return {}

    def close(self) -> None:
        if self._sender:
            self._sender.close()


class _Broadcast:
    """A `Carrier`."""

    def __init__(self, address: str, device: torch.device, timeout_seconds: float) -> None:
        self._address, self._device, self._timeout = address, device, timeout_seconds
        self.group: Group | None = None

    def connect(self, engines: Sequence[WeightReceiver]) -> tuple[list[dict[str, Any]], Awaitable[Any]]:
        world_size = 1 + sum(engine.workers for engine in engines)
        # A listener of ours, because the store's own would be on every interface. It takes the socket over.
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        listener = socket.create_server((self._address, 0), family=family, backlog=world_size)
        port = listener.getsockname()[1]
        told, offset = [], 1
        for engine in engines:
            info = {"host": self._address, "port": port, "rank_offset": offset, "world_size": world_size}
            told.append({**info, "timeout_seconds": self._timeout})
            offset += engine.workers

        def join() -> Group:
            return join_group(self._address, port, 0, world_size, self._timeout, listener.detach(), self._device)

        return told, self._take(_in_thread(join))

    async def _take(self, joining: Awaitable[Group]) -> None:
        self.group = await joining

    async def carry(self, bucket: Bucket) -> None:
        assert self.group
        works: list[Any] = []
        try:
            await self.group.all_present()
            works += [self.group.transmit(flat) for flat in bucket.flats]
            await self.group.sent(works)
        except BaseException:
            # On a GPU, the transmission goes on waiting for who is gone, and whoever waits for the GPU waits for it.
            # Other members wait for what is not sent any more.
            works.clear()
            self.group.abandon()
            raise

    def close(self) -> None:
        if self.group:
            self.group.abandon()
        self.group = None


class TwoRooms:
    """A `Stowage`: large tensors are sent from where they are, the others from two rooms, which take turns.

    Args:
        bucket_bytes: size of a room. A larger tensor is alone in its bucket.
        device: where buckets are wanted.
    """

    def __init__(self, bucket_bytes: int, device: torch.device) -> None:
        self._bucket_bytes, self._device = bucket_bytes, device
        self._rooms: list[Tensor] = []
        self._own: list[Tensor | None] = []
        """Of each tensor of the bucket, its bytes, where they are sent from there."""
        self._sizes: list[int] = []

    def begin(self, number: int) -> None:
        self._rooms.reverse()
        self._own, self._sizes = [], []

    def add(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        self._sizes.append(tensor.nbytes)
        if tensor.nbytes > self._bucket_bytes or (is_large(tensor.nbytes) and tensor.is_contiguous()):
            self._own.append(bytes_of(tensor))
            return
        if not self._rooms:
            self._rooms = [torch.empty(self._bucket_bytes, dtype=torch.uint8, device=tensor.device) for _ in range(2)]
        put(tensor, self._rooms[0], offsets(self._sizes)[0][-1])
        self._own.append(None)

    def skip(self, tensor: Tensor) -> None: ...

    def cut(self, count: int) -> None:
        del self._own[count:], self._sizes[count:]

    def finish(self) -> tuple[dict[str, Any], list[Tensor]]:
        flats = []
        for first, start, end in pieces(self._sizes):
            own = self._own[first]
            flats.append(self._rooms[0][start:end] if own is None else own)
        return {}, [flat.to(self._device) for flat in flats]


def _in_thread(function: Callable[[], Any]) -> Awaitable[Any]:
    """Call a function that blocks. Unlike asyncio.to_thread, nobody waits for it at exit where it never returns."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if future.cancelled():
            return
        if error:
            future.set_exception(error)
        else:
            future.set_result(result)

    def work() -> None:
        try:
            result, error = function(), None
        except Exception as raised:
            result, error = None, raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, daemon=True).start()
    return future
