"""Keeps the ranks of a run in touch beside their collectives: who has come how far, who failed, who is gone.

A collective knows none of that: it waits, for a rank that samples for hours as for one that was killed. So the leader
(rank 0) listens, every other rank keeps one connection to it, and a thread at either end sends a beat, whatever the
main thread does. What crosses is JSON, one object a line:

    {"token": "5c1f...", "rank": 5, "host": "node7"}    the first line, from the rank that connects
    {"beat": "rollout"}                                 either way: I live, and this is what I came to last
    {"go": "rollout"}                                   from the leader, which has come to this call of `after_leader`
    {"failed": "error: ...", "code": 1}                 to the leader, which answers with `end`
    {"end": 1}                                          from the leader, which says why: leave with this exit code
    {"bye": true}                                       either way: I am done, and my connection will end
"""

from __future__ import annotations

import asyncio
import hmac
import json
import queue
import secrets
import socket
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from dapo_megatron.errors import DapoError

SETTLE_SECONDS = 1.0
"""From a failure elsewhere to its end of this rank. Who fails itself meanwhile, or was started by somebody who saw the
other one die, can say more."""
_BEATS = 5
"""Beats in the time after which a silent rank counts as lost."""
_ANSWER_SECONDS = 7.0
"""For the leader to unwind and say the reason of another rank; then that rank says it itself, before it must leave."""
_SEND_SECONDS = 2.0
_REASON_CHARACTERS = 16_000
_LINE_BYTES = 1 << 18
"""A reason fits in, although JSON may spell a character with 12 bytes."""


class Store(Protocol):
    """Where ranks find one another (torch.distributed.Store); `get` waits for a value, up to the store's limit."""

    def set(self, key: str, value: str, /) -> Any: ...

    def get(self, key: str, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run ends."""

    reason: str
    """For people; empty where somebody else says it."""
    exit_code: int


class Peers:
    """The other ranks of the run; there are none in a run of one process, of which this is the whole."""

    def after_leader(self, what: str) -> None:
        """Return when the leader has come to this call; on the leader, at once.

        All ranks make the same calls in the same order. One goes before every collective in which the others would
        otherwise wait for work that only the leader does, and has no limit: as long as the leader lives, it is waited
        for.

        Raises:
            RuntimeError: where the leader has come to another one.
        """

    def failure(self) -> Failure | None:
        """Why another rank ended or is lost, after waiting as long as it can take to notice that; None if none is."""

    def tell(self, failure: Failure) -> bool:
        """End the run: tell the others that this rank fails. Returns whether somebody else says the reason."""
        return False

    def close(self) -> None:
        """Leave, all being well. Safe to call twice."""


def join(
    store: Store,
    rank: int,
    world_size: int,
    on_failure: Callable[[Failure], None],
    *,
    address: str | None,
    lost_seconds: float,
    join_seconds: float,
) -> Peers:
    """Connect the ranks. Returns when this rank is connected; on the leader, when all are.

    Args:
        store: has the same content on every rank. It takes the place and the token of this connection.
        on_failure: called once, in a thread of its own, when another rank failed or is lost, or the leader says to
            leave. On the leader the reason names the rank; elsewhere it is empty unless the leader is lost.
        address: under which this machine knows the leader's; None where all ranks are on this machine.
        lost_seconds: without a beat after which a rank counts as lost.
        join_seconds: limit on this call.

    Raises:
        DapoError: where not all ranks come in time.
    """
    if world_size == 1:
        return Peers()
    if rank == 0:
        return _Leader(store, world_size, on_failure, address, lost_seconds, join_seconds)
    return _Follower(store, rank, on_failure, address, lost_seconds, join_seconds)


@dataclass(slots=True)
class _Link:
    """The connection to another rank."""

    name: str
    writer: asyncio.StreamWriter
    heard: float
    """When something came last, in seconds of the loop's clock, which stands still while the machine is suspended."""
    doing: str = "the start"
    left: bool = False


class _Watch(Peers):
    """What both ends do. Private methods run on the loop, in its thread, where they do not say otherwise."""

    def __init__(self, on_failure: Callable[[Failure], None], lost_seconds: float) -> None:
        self._on_failure, self._lost_seconds = on_failure, lost_seconds
        self._links: list[_Link] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._doing = "the start"
        self._ending = False
        self._failure: Failure | None = None
        self._failed = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="heartbeat", daemon=True)
        self._thread.start()

    def failure(self) -> Failure | None:
        self._failed.wait(self._lost_seconds * (1 + 2 / _BEATS) + 1)
        return self._failure

    def close(self) -> None:
        if self._loop.is_closed():
            return
        with suppress(TimeoutError):
            self._run(self._leave(), _SEND_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_SEND_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None], seconds: float) -> None:
        """Do `work` on the loop; called from other threads."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            future.result(seconds)
        finally:
            future.cancel()

    def _say(self, message: dict[str, Any]) -> None:
        """Send, and return when the kernel has it; called from other threads."""

        async def send() -> None:
            self._send(message)

        if not self._loop.is_closed():
            with suppress(TimeoutError):
                self._run(send(), _SEND_SECONDS)

    async def _leave(self) -> None:
        self._ending = True
        self._send({"bye": True})
        for link in self._links:
            link.writer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _send(self, message: dict[str, Any]) -> None:
        for link in self._links:
            if not link.writer.is_closing():
                link.writer.write(json.dumps(message).encode() + b"\n")

    async def _beat(self) -> None:
        pause = self._lost_seconds / _BEATS
        while True:
            before = self._loop.time()
            await asyncio.sleep(pause)
            now = self._loop.time()
            for link in self._links:
                if now - before > 2 * pause:  # this process was stopped itself: what came meanwhile is yet to be read
                    link.heard = now
                elif now - link.heard > self._lost_seconds:
                    self._lost(link, f"nothing was heard from it for {now - link.heard:.0f} s")
            self._send({"beat": self._doing})

    async def _listen(self, link: _Link, reader: asyncio.StreamReader) -> None:
        with suppress(OSError, ValueError):  # a broken connection, a line that is too long or no JSON
            while line := await reader.readline():
                link.heard = self._loop.time()
                self._take(link, json.loads(line))
        self._lost(link, "its connection broke off")

    def _take(self, link: _Link, message: dict[str, Any]) -> None:
        match message:
            case {"beat": doing}:
                link.doing = str(doing)
            case {"bye": True}:
                link.left = True

    def _lost(self, link: _Link, how: str) -> None:
        if not link.left:
            self._fail(Failure(f"error: {link.name} is lost: {how}; it had come to: {link.doing}", 1), SETTLE_SECONDS)

    def _fail(self, failure: Failure, after_seconds: float) -> None:
        if self._ending or self._failure:
            return
        self._failure = failure
        # In a thread of its own, for this one goes on beating until the end.
        ending = threading.Thread(target=self._on_failure, args=(failure,), daemon=True)

        def settled() -> None:
            self._failed.set()
            ending.start()

        self._loop.call_later(after_seconds, settled)


class _Leader(_Watch):
    def __init__(
        self,
        store: Store,
        world_size: int,
        on_failure: Callable[[Failure], None],
        address: str | None,
        lost_seconds: float,
        join_seconds: float,
    ) -> None:
        super().__init__(on_failure, lost_seconds)
        self._token = secrets.token_hex(32)
        self._missing = set(range(1, world_size))
        self._complete = asyncio.Event()
        listener = socket.create_server(("127.0.0.1", 0)) if address is None else _listen_everywhere()
        place = {"port": listener.getsockname()[1], "token": self._token, "name": socket.gethostname()}
        store.set("heartbeat", json.dumps(place))
        try:
            self._run(self._gather(listener), join_seconds)
        except BaseException as error:
            # Those that are there already would wait for the checks for ever.
            self.tell(self._failure or Failure("", 1))
            self.close()
            if not isinstance(error, TimeoutError):
                raise
            raise DapoError(
                f"ranks {sorted(self._missing)} of {world_size} did not come within launch.collective_seconds"
                f"({join_seconds:g}): look at what they or their machines say"
            ) from error

    def after_leader(self, what: str) -> None:
        self._doing = what
        self._loop.call_soon_threadsafe(self._send, {"go": what})

    def tell(self, failure: Failure) -> bool:
        self._ending = True
        self._say({"end": failure.exit_code})
        return False

    async def _gather(self, listener: socket.socket) -> None:
        server = await asyncio.start_server(self._accept, sock=listener, limit=_LINE_BYTES)
        self._tasks.append(asyncio.create_task(self._beat()))
        try:
            await self._complete.wait()
        finally:
            server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._lost_seconds):
                hello = json.loads(await reader.readline())
            rank, host, token = int(hello["rank"]), str(hello["host"]), str(hello["token"])
            if rank not in self._missing or not hmac.compare_digest(token.encode(), self._token.encode()):
                raise ValueError("a stranger")
        except (OSError, ValueError, TypeError, KeyError):
            writer.close()
            return
        self._missing.remove(rank)
        link = _Link(f"rank {rank} on {host}", writer, self._loop.time())
        self._links.append(link)
        self._tasks.append(asyncio.create_task(self._listen(link, reader)))
        if not self._missing:
            self._complete.set()

    def _take(self, link: _Link, message: dict[str, Any]) -> None:
        match message:
            case {"failed": reason, "code": int(code)}:
                self._fail(Failure(f"{link.name}: {reason}", code), SETTLE_SECONDS)
            case _:
                super()._take(link, message)


class _Follower(_Watch):
    def __init__(
        self,
        store: Store,
        rank: int,
        on_failure: Callable[[Failure], None],
        address: str | None,
        lost_seconds: float,
        join_seconds: float,
    ) -> None:
        super().__init__(on_failure, lost_seconds)
        self._went: queue.SimpleQueue[str] = queue.SimpleQueue()
        place = json.loads(store.get("heartbeat"))
        try:
            self._run(self._connect(rank, address or "127.0.0.1", place), join_seconds)
        except OSError as error:  # TimeoutError included
            self.close()
            raise DapoError(
                f"rank {rank} cannot reach the leader on {place['name']}, {address or '127.0.0.1'}:{place['port']}: "
                f"{error!r}; the port is any free one, so that machines of a run must let one another through"
            ) from error

    def after_leader(self, what: str) -> None:
        self._doing = f"waiting for the leader's {what}"
        went = self._went.get()
        if went != what:
            raise RuntimeError(f"ranks must make the same calls: the leader has come to {went!r}, this one to {what!r}")
        self._doing = what

    def tell(self, failure: Failure) -> bool:
        self._say({"failed": failure.reason[-_REASON_CHARACTERS:], "code": failure.exit_code})
        # Not to leave before the leader has spoken: whoever sees this process end may end the leader.
        return self._failed.wait(_ANSWER_SECONDS)

    async def _connect(self, rank: int, address: str, place: dict[str, Any]) -> None:
        reader, writer = await asyncio.open_connection(
            address, place["port"], limit=_LINE_BYTES, happy_eyeballs_delay=0.25
        )
        link = _Link(f"the leader, rank 0 on {place['name']},", writer, self._loop.time())
        self._links.append(link)
        self._send({"token": place["token"], "rank": rank, "host": socket.gethostname()})
        self._tasks += [asyncio.create_task(self._listen(link, reader)), asyncio.create_task(self._beat())]

    def _take(self, link: _Link, message: dict[str, Any]) -> None:
        match message:
            case {"go": what}:
                link.doing = str(what)
                self._went.put(link.doing)
            case {"end": int(code)}:
                link.left = True
                self._fail(Failure("", code), 0.0)
            case _:
                super()._take(link, message)


def _listen_everywhere() -> socket.socket:
    """The address that others know may not be one of an interface here. Strangers lack the token."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))
