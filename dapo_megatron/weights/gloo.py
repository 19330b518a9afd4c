"""Weights over gloo: one group holds the leader (rank 0) and all workers of all engines, on CPU.

The group has a store of its own and has nothing to do with torch.distributed's default group.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from dapo_megatron.errors import EngineError
from dapo_megatron.measures import Measures, Sum
from dapo_megatron.routes import LOOPBACK, find_route
from dapo_megatron.weights.buckets import Named, buckets, flatten, only_sizes
from dapo_megatron.weights.checksum import checksums
from dapo_megatron.weights.publish import AfterLeader, Receivers, WeightReceiver
from dapo_megatron.weights.verify import Inventory, Tally

BACKEND = "gloo"
"""Name under which engines know this transport."""
_POLL_SECONDS = 0.0005


class GlooPublisher:
    """A `Publisher` whose leader sends all weights; the other ranks only take part in gathering them.

    Args:
        inventory: what every push brings, on the leader.
        receivers: the engines, on the leader; None on other ranks.
        bucket_bytes: most bytes in memory at a time, except where one tensor is larger.
        after_leader: called on every rank before the weights of a bucket are gathered, while which the leader may be
            busy with the one before.
        timeout_seconds: limit on connecting and on each bucket. Engines have their own (`WeightReceiver`).
        with_checksums: whether engines get checksums to compare what has arrived with.
        address: of this machine, at which engines reach it, and the only one that is listened at.

    Raises:
        EngineError: when an engine does not join the group.
    """

    def __init__(
        self,
        inventory: Inventory | None,
        receivers: Receivers | None,
        bucket_bytes: int,
        after_leader: AfterLeader = lambda what: None,
        *,
        timeout_seconds: float,
        with_checksums: bool = True,
        address: str = LOOPBACK,
    ) -> None:
        self._bucket_bytes, self._after_leader = bucket_bytes, after_leader
        self._sender = None
        if receivers is not None:
            assert inventory is not None
            self._sender = _Sender(inventory, receivers, timeout_seconds, with_checksums, address)

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Measures:
        if self._sender:
            gathered = self._buckets(weights)
            try:
                return self._sender.send(gathered, version)
            except EngineError:
                deque(gathered, maxlen=0)  # the others gather to the end
                raise
        deque(self._buckets(only_sizes(weights)), maxlen=0)
        return {}

    def _buckets(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[Named]:
        return buckets(weights, self._bucket_bytes, lambda: self._after_leader("bucket"))

    def close(self) -> None:
        if self._sender:
            self._sender.close()


class _Sender:
    """The leader's end: each bucket is announced to the engines while it is broadcast."""

    def __init__(
        self, inventory: Inventory, receivers: Receivers, timeout_seconds: float, with_checksums: bool, address: str
    ) -> None:
        self._inventory, self._tally = inventory, Tally(inventory)
        self._receivers = receivers
        self._timeout = timeout_seconds
        self._with_checksums, self._address = with_checksums, address
        self._sending = False
        self._broken: list[Any] = []
        """Groups that were left in the middle of a bucket: dropping one would wait for it, up to the limit."""
        self._members: list[WeightReceiver] = []
        """The engines in the group."""
        self._group: Any = None
        receivers.run(self._connect())

    def send(self, weights: Iterator[Named], version: int) -> Measures:
        return self._receivers.run(self._send(weights, version))

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

    async def _send(self, weights: Iterator[Named], version: int) -> Measures:
        if list(self._receivers) != self._members:  # some were started again
            await self._connect()
        engines = self._members
        await self._all([engine.begin_transfer() for engine in engines], "beginning to send weights")
        self._tally.begin()
        seconds = 0.0
        for bucket in weights:
            tensors = self._tally.find(bucket)
            self._tally.count(tensors)
            started = time.monotonic()
            sums = checksums([tensor for _, tensor in bucket]) if self._with_checksums else None
            seconds += time.monotonic() - started
            info = {"tensors": tensors, **self._inventory.describe(tensors), "checksums": sums}
            announced = [engine.receive(info) for engine in engines]
            await self._all([self._transmit(bucket), *announced], f"sending {bucket[0][0]} and what follows it")
        self._tally.end()
        await self._all([engine.finish_transfer(version) for engine in engines], "putting weights to use")
        return {"verify/tensors": Sum(len(self._inventory.names)), "seconds/verify": Sum(seconds)}

    async def _transmit(self, bucket: Named) -> None:
        flat = flatten(bucket)
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
