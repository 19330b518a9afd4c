"""The leader's end of a push: which buckets engines get, and that each of them has what it was sent.

How the bytes come to them is a `Carrier`'s business.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict
from typing import Any, Protocol

from dapo_megatron.errors import EngineError
from dapo_megatron.measures import Max, Measures, Sum
from dapo_megatron.weights.delta import Delta
from dapo_megatron.weights.gathering import Passes
from dapo_megatron.weights.outgoing import Bucket, Outgoing
from dapo_megatron.weights.publish import Receivers, WeightReceiver, asked
from dapo_megatron.weights.verify import Inventory, Tally

_ACCOUNT_SECONDS = 5.0
"""For engines to say what has become of a push, once the carrier has failed."""
_SAME_SECONDS = 1.0
"""Within which the failure of two engines is taken for one, whose fault is not known."""


class Carrier(Protocol):
    """Brings the bytes of a bucket to the workers of all engines."""

    def connect(self, engines: Sequence[WeightReceiver]) -> tuple[list[dict[str, Any]], Awaitable[Any]]:
        """Return what each engine is told when it joins, and what the leader awaits meanwhile."""
        ...

    async def carry(self, bucket: Bucket) -> None:
        """Bring a bucket to the engines, which have just been told of it.

        Raises:
            RuntimeError: where that fails.
        """
        ...

    def close(self) -> None:
        """Let go of the engines. Safe to call twice."""
        ...


class Sender:
    """Announces each bucket to the engines while it is carried, and the next one is made.

    Args:
        with_checksums: whether engines get checksums to compare what has arrived with.
        delta: whether layers that the engines have are left out.

    Raises:
        EngineError: when an engine does not join.
    """

    def __init__(
        self,
        inventory: Inventory,
        outgoing: Outgoing,
        carrier: Carrier,
        receivers: Receivers,
        *,
        with_checksums: bool,
        delta: bool,
    ) -> None:
        self._inventory, self._tally, self._index = inventory, Tally(inventory), inventory.index
        self._outgoing, self.carrier, self._receivers, self._sizes = outgoing, carrier, receivers, inventory.sizes
        self._with_checksums, self._wants_delta = with_checksums, delta
        self._members: list[WeightReceiver] = []
        """The engines that have joined."""
        self._joined = False
        receivers.run(self._connect())

    def send(self, passes: Passes, version: int) -> Measures:
        try:
            return self._receivers.run(self._send(passes, version))
        except BaseException:
            self.close()  # members may be in the midst of anything
            raise

    def close(self) -> None:
        self.carrier.close()
        self._members, self._joined = [], False

    async def _connect(self) -> None:
        """Join with the engines that are there."""
        self.close()
        engines, inventory = list(self._receivers), asdict(self._inventory)
        told, joining = self.carrier.connect(engines)
        joins = [
            asked(engine, engine.join_group({**info, "inventory": inventory}))
            for engine, info in zip(engines, told, strict=True)
        ]
        await _all([joining, *joins], "joining the weight-transfer group")
        self._members, self._joined = engines, True
        self._delta = Delta(self._wants_delta and all(engine.keeps for engine in engines))

    async def _send(self, passes: Passes, version: int) -> Measures:
        if not self._joined or list(self._receivers) != self._members:  # some were started again
            await self._connect()
        engines, delta, outgoing = self._members, self._delta, self._outgoing
        began = time.monotonic()
        await _all([asked(engine, engine.begin_transfer()) for engine in engines], "beginning to send weights")
        self._tally.begin()
        delta.begin()
        sent = await self._deliver_all(outgoing.buckets(passes.take(), delta))
        if late := delta.late:
            sent += await self._deliver_all(outgoing.buckets(passes.take(), delta, only=late))
        await self._leave(delta.kept)
        self._tally.end()
        await _all([asked(engine, engine.finish_transfer(version)) for engine in engines], "putting weights to use")
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
                    flight = asyncio.ensure_future(self._deliver(bucket)) if bucket.tensors else None
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
        info = {**self._announcement(bucket.tensors, bucket.sums, kept=False), **bucket.place}
        announced = [asked(engine, engine.receive(info)) for engine in self._members]
        doing = f"sending {self._inventory.names[bucket.tensors[0]]} and what follows it"
        await _all([self.carrier.carry(bucket), *announced], doing)

    async def _leave(self, names: Sequence[str]) -> None:
        """Tell the engines which tensors they keep."""
        if names:
            tensors = [self._index[name] for name in names]
            self._tally.count(tensors)
            info = self._announcement(tensors, [self._delta.sums[name] for name in names], kept=True)
            steps = [asked(engine, engine.receive(info)) for engine in self._members]
            await _all(steps, f"leaving out {names[0]} and others")

    def _announcement(self, tensors: Sequence[int], sums: Sequence[int] | None, *, kept: bool) -> dict[str, Any]:
        described = self._inventory.describe(tensors)
        return {"tensors": tensors, **described, "checksums": sums if self._with_checksums else None, "kept": kept}


async def _all(steps: Sequence[Awaitable[Any]], doing: str) -> list[Any]:
    """Await all of `steps`; the first failure ends them, an engine's own account of it before the carrier's."""
    tasks = [asyncio.ensure_future(step) for step in steps]
    try:
        return await asyncio.gather(*tasks)
    except (RuntimeError, EngineError) as error:
        # The carrier only knows that a connection broke. The engine that broke it is about to say why, and others that
        # nothing comes any more.
        await asyncio.wait(tasks, timeout=_ACCOUNT_SECONDS if isinstance(error, RuntimeError) else _SAME_SECONDS)
        ended = [task.exception() for task in tasks if task.done() and not task.cancelled()]
        accounts = [account for account in ended if isinstance(account, EngineError)]
        if not accounts:
            raise EngineError(f"{doing}: {error}") from error
        first = error if isinstance(error, EngineError) else accounts[0]
        if len(accounts) > 1:
            first.engine = None
        raise first from (None if first is error else error)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # the carrier lets go of what it was sending
