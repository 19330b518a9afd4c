"""Weights over gloo: one group holds the leader (rank 0) and all workers of all engines, on CPU.

The group has a store of its own and has nothing to do with torch.distributed's default group.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from dapo_megatron.errors import EngineError
from dapo_megatron.measures import Max, Measures, Sum
from dapo_megatron.routes import LOOPBACK, find_route
from dapo_megatron.weights.delta import Delta
from dapo_megatron.weights.gathering import Gathering, Passes
from dapo_megatron.weights.outgoing import Bucket, Outgoing
from dapo_megatron.weights.publish import LeaderSays, Receivers, WeightReceiver
from dapo_megatron.weights.verify import Inventory, Tally

_POLL_SECONDS = 0.0005


class GlooPublisher:
    """A `Publisher` whose leader sends all weights; the other ranks only take part in gathering them.

    Args:
        inventory: what every push brings, on the leader.
        receivers: the engines, on the leader; None on other ranks.
        bucket_bytes: of this size are two buckets that the leader has at a time, one on its way and one that is made;
            one larger tensor is a bucket, too.
        leader_says: called on every rank before the weights of a bucket are gathered, while which the leader may be
            busy with the one before, and once they all were: whether that was the end.
        timeout_seconds: limit on connecting and on each bucket. Engines have their own (`WeightReceiver`).
        with_checksums: whether engines get checksums to compare what has arrived with.
        delta: whether layers that the engines have are left out.
        address: of this machine, at which engines reach it, and the only one that is listened at.

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
    ) -> None:
        self._gathering = Gathering(bucket_bytes, leader_says)
        self._sender = None
        if receivers is not None:
            assert inventory is not None
            outgoing = Outgoing(inventory, bucket_bytes, with_sums=with_checksums or delta)
            self._sender = _Sender(inventory, outgoing, receivers, timeout_seconds, with_checksums, delta, address)

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


class _Sender:
    """The leader's end: each bucket is announced to the engines while it is broadcast."""

    def __init__(
        self,
        inventory: Inventory,
        outgoing: Outgoing,
        receivers: Receivers,
        timeout_seconds: float,
        with_checksums: bool,
        delta: bool,
        address: str,
    ) -> None:
        self._inventory, self._tally, self._index = inventory, Tally(inventory), inventory.index
        self._outgoing, self._receivers, self._sizes = outgoing, receivers, inventory.sizes
        self._timeout = timeout_seconds
        self._with_checksums, self._wants_delta = with_checksums, delta
        self._address = address
        self._sending = False
        self._broken: list[Any] = []
        """Groups that were left in the middle of a bucket: dropping one would wait for it, up to the limit."""
        self._members: list[WeightReceiver] = []
        """The engines in the group."""
        self._group: Any = None
        receivers.run(self._connect())

    def send(self, passes: Passes, version: int) -> Measures:
        return self._receivers.run(self._send(passes, version))

    def close(self) -> None:
        if self._sending:
            self._broken.append(self._group)
        self._group, self._members, self._sending = None, [], False

    async def _connect(self) -> None:
        """Make a group with the engines that are there."""
        self.close()
        engines = list(self._receivers)
        world_size = 1 + sum(engine.workers for engine in engines)
        # A listener of ours, because the store's own would be on every interface. It takes the socket over.
        listener = socket.create_server((self._address, 0), family=_family(self._address), backlog=world_size)
        port = listener.getsockname()[1]
        joins: list[Awaitable[Any]] = [
            _in_thread(lambda: join_group(self._address, port, 0, world_size, self._timeout, listener.detach()))
        ]
        offset = 1
        for engine in engines:
            info = {
                "host": self._address,
                "port": port,
                "rank_offset": offset,
                "world_size": world_size,
                "timeout_seconds": self._timeout,
                "inventory": asdict(self._inventory),
            }
            joins.append(engine.join_group(info))
            offset += engine.workers
        self._group, *_ = await self._all(joins, "joining the weight-transfer group")
        self._members = engines
        self._delta = Delta(self._wants_delta and all(engine.keeps for engine in engines))

    async def _send(self, passes: Passes, version: int) -> Measures:
        if list(self._receivers) != self._members:  # some were started again
            await self._connect()
        engines, delta, outgoing = self._members, self._delta, self._outgoing
        began = time.monotonic()
        await self._all([engine.begin_transfer() for engine in engines], "beginning to send weights")
        self._tally.begin()
        delta.begin()
        sent = await self._deliver_all(outgoing.buckets(passes.take(), delta))
        if late := delta.late:
            sent += await self._deliver_all(outgoing.buckets(passes.take(), delta, only=late))
        await self._leave(delta.kept)
        self._tally.end()
        await self._all([engine.finish_transfer(version) for engine in engines], "putting weights to use")
        delta.confirm()
        seconds = time.monotonic() - began
        return {
            "verify/tensors": Sum(len(self._inventory.names)),
            "seconds/verify": Sum(outgoing.take_seconds()),
            "push/seconds": Sum(seconds),
            "push/share": Max(sent / sum(self._sizes)),
            "push/gb_per_second": Max(sent / seconds / 1e9),
        }

    async def _deliver_all(self, made: AsyncGenerator[Bucket]) -> int:
        """Deliver each bucket while the next one is made. Returns their bytes."""
        sent, flight = 0, None
        try:
            async with aclosing(made):
                async for bucket in made:
                    if flight:
                        await flight
                    sent += sum(self._sizes[index] for index in bucket.tensors)
                    flight = asyncio.ensure_future(self._deliver(bucket))
            if flight:
                await flight
        finally:
            if flight and not flight.done():
                flight.cancel()
                with suppress(asyncio.CancelledError, EngineError):
                    await flight
        return sent

    async def _deliver(self, bucket: Bucket) -> None:
        self._tally.count(bucket.tensors)
        info = self._announcement(bucket.tensors, bucket.sums, kept=False)
        announced = [engine.receive(info) for engine in self._members]
        doing = f"sending {self._inventory.names[bucket.tensors[0]]} and what follows it"
        await self._all([self._transmit(bucket.flat), *announced], doing)

    async def _leave(self, names: Sequence[str]) -> None:
        """Tell the engines which tensors they keep."""
        if names:
            tensors = [self._index[name] for name in names]
            self._tally.count(tensors)
            info = self._announcement(tensors, [self._delta.sums[name] for name in names], kept=True)
            await self._all([engine.receive(info) for engine in self._members], f"leaving out {names[0]} and others")

    def _announcement(self, tensors: Sequence[int], sums: Sequence[int] | None, *, kept: bool) -> dict[str, Any]:
        described = self._inventory.describe(tensors)
        return {"tensors": tensors, **described, "checksums": sums if self._with_checksums else None, "kept": kept}

    async def _transmit(self, flat: Tensor) -> None:
        self._sending = True
        work = transmit(self._group, flat)
        # Waiting on the work itself would keep an engine's error from being heard.
        deadline = time.monotonic() + self._timeout
        while not work.is_completed() and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        work.wait(timedelta(milliseconds=1))
        self._sending = False

    async def _all(self, steps: Sequence[Awaitable[Any]], doing: str) -> list[Any]:
        """Await all of `steps`; the first failure ends them, an engine's own account of it before gloo's."""
        tasks = [asyncio.ensure_future(step) for step in steps]
        try:
            return await asyncio.gather(*tasks)
        except RuntimeError as error:
            # Gloo only knows that a connection broke. The engine that broke it is about to say why.
            await asyncio.wait(tasks, timeout=5.0)
            for task in tasks:
                if task.done() and not task.cancelled() and isinstance(task.exception(), EngineError):
                    raise task.exception() from error  # pyright: ignore[reportGeneralTypeIssues]
            raise EngineError(f"{doing}: {error}") from error
        finally:
            for task in tasks:
                task.cancel()


def join_group(
    host: str, port: int, rank: int, world_size: int, timeout_seconds: float, listener: int | None = None
) -> Any:
    """The transfer group, once all `world_size` members are in it. Rank 0 brings a listening socket's descriptor."""
    timeout = timedelta(seconds=timeout_seconds)
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        host, port, is_master=rank == 0, wait_for_workers=False, timeout=timeout, master_listen_fd=listener
    )
    options = c10d.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    # By default gloo resolves the machine's own name, which many containers and laptops cannot. On its way to the
    # leader, a member has an address that the others reach, too.
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=find_route(host).local)]
    options._timeout = timeout
    return c10d.ProcessGroupGloo(c10d.PrefixStore("weights", store), rank, world_size, options)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


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


def transmit(group: Any, flat: Tensor) -> c10d.Work:
    """Start sending (rank 0) or receiving (the others) a flat bucket."""
    options = c10d.BroadcastOptions()
    options.rootRank = 0
    return group.broadcast([flat], options)
