"""What both ends of a connection do: send beats, listen for them, and miss them."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from dapo_megatron.heartbeat.peers import SETTLE_SECONDS, Failure, Peers

LINE_BYTES = 1 << 18
"""A reason fits in, although JSON may spell a character with 12 bytes."""
NAMED = 8
"""Ranks that a message names at the most. More of them share their fate, and a number says as much."""
_BEATS = 5
"""Beats in the time after which a silent rank counts as lost."""
_SEND_SECONDS = 2.0
_PACKAGE = __name__.partition(".")[0]


@dataclass(slots=True)
class Link:
    """The connection to another rank."""

    rank: int
    name: str
    writer: asyncio.StreamWriter
    heard: float
    """When something came last, in seconds of the loop's clock, which stands still while the machine is suspended."""
    doing: str = "the start"
    come_to: str | None = None
    """The call of `together` in which the rank waits."""
    left: bool = False
    """Whether it has said that it leaves, or was missed already."""
    silent: bool = False
    """Whether its last letter was given out."""


class Watch(Peers):
    """Private methods run on the loop, in its thread, where they do not say otherwise."""

    def __init__(self, on_failure: Callable[[Failure], None], lost_seconds: float) -> None:
        super().__init__()
        self._on_failure, self._lost_seconds = on_failure, lost_seconds
        self._links: list[Link] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._doing = "the start"
        self._ending = False
        self._lost: list[tuple[Link, str]] = []
        """Who is missed, in this order, and how that was noticed."""
        self._failure: Failure | None = None
        self._failed = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="heartbeat", daemon=True)
        self._thread.start()

    def failure(self) -> Failure | None:
        self._doing = f"{self._doing}, in a collective that failed"
        self._failed.wait(self._lost_seconds * (1 + 2 / _BEATS) + 1)
        return self._failure

    def post(self, rank: int, letter: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._send, {"letter": letter}, rank)

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

    def _send(self, message: dict[str, Any], rank: int | None = None) -> None:
        """Send to all links, or to that of a rank."""
        for link in self._links:
            if rank in (None, link.rank) and not link.writer.is_closing():
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
                    self._miss(link, f"nothing was heard from it for {now - link.heard:.0f} s")
            self._send({"beat": f"{self._doing}{_place()}"})

    async def _listen(self, link: Link, reader: asyncio.StreamReader) -> None:
        try:
            with suppress(OSError, ValueError):  # a broken connection, a line that is too long or no JSON
                while line := await reader.readline():
                    link.heard = self._loop.time()
                    self._take(link, json.loads(line))
            self._miss(link, "its connection broke off")
        finally:
            self._end_letters(link)

    def _take(self, link: Link, message: dict[str, Any]) -> None:
        match message:
            case {"beat": doing}:
                link.doing = str(doing)
            case {"letter": letter} if not link.silent:
                self.letters.put((link.rank, letter))
            case {"bye": True}:
                link.left = True

    def _miss(self, link: Link, how: str) -> None:
        if not link.left:
            link.left = True
            self._end_letters(link)
            self._lost.append((link, how))
            self._fail(self._all_lost, SETTLE_SECONDS)

    def _end_letters(self, link: Link) -> None:
        if not link.silent:
            link.silent = True
            self.letters.put((link.rank, None))

    def _all_lost(self) -> Failure:
        """Name all ranks that were lost until now, for the one that was lost first need not be the cause."""
        (link, how), *more = self._lost
        if not more:
            return Failure(f"error: {link.name} is lost: {how}; it had come to: {link.doing}", 1)
        names = enumerated([f"{link.name} ({how})" for link, how in self._lost])
        return Failure(f"error: {len(self._lost)} ranks are lost, in this order: {names}", 1, late=True)

    def _fail(self, settle: Callable[[], Failure], after_seconds: float) -> None:
        """End this rank with the failure that `settle` gives after so long, unless it is ending already."""
        if self._ending:
            return
        self._ending = True

        def settled() -> None:
            self._failure = settle()
            self._failed.set()
            # In a thread of its own, for this one goes on beating until the end.
            threading.Thread(target=self._on_failure, args=(self._failure,), daemon=True).start()

        self._loop.call_later(after_seconds, settled)


def enumerated(names: list[str]) -> str:
    """Join names, the first of them where there are many.

    >>> enumerated(["rank 1", "rank 2"]), enumerated([str(number) for number in range(20)])
    ('rank 1, rank 2', '0, 1, 2, 3, 4, 5, 6, 7 and 12 more')
    """
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _place() -> str:
    """Where in this package the main thread is, or the call of something else that it made from there."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame:
        module = str(frame.f_globals.get("__name__"))
        if module.startswith(f"{_PACKAGE}.") and not module.startswith(f"{_PACKAGE}.heartbeat"):
            return f", at {module}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
