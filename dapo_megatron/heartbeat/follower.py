"""The end of every other rank: a connection to the leader."""

from __future__ import annotations

import asyncio
import json
import queue
import socket
import sys
from collections.abc import Callable
from typing import Any

from dapo_megatron.errors import DapoError
from dapo_megatron.heartbeat.peers import Failure, Store
from dapo_megatron.heartbeat.watch import LINE_BYTES, Link, Watch

_ANSWER_SECONDS = 7.0
"""For the leader to unwind and say the reason of another rank; then that rank says it itself, before it must leave."""
_REASON_CHARACTERS = 16_000


class Follower(Watch):
    def __init__(
        self,
        store: Store,
        rank: int,
        on_failure: Callable[[Failure], None],
        address: str | None,
        lost_seconds: float,
        join_seconds: float,
    ) -> None:
        try:
            place = json.loads(store.get("heartbeat"))
        except RuntimeError as error:  # torch's for a limit that is over, and for a store that is gone
            raise DapoError(
                f"rank {rank} has heard nothing of the leader within launch.join_seconds({join_seconds:g}): look at "
                f"what rank 0 or its machine says; {str(error).splitlines()[0]}"
            ) from error
        if "end" in place:  # the leader says why
            sys.exit(int(place["end"]))
        super().__init__(on_failure, lost_seconds)
        self._went: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        try:
            self._run(self._connect(rank, address or "127.0.0.1", place), join_seconds)
        except OSError as error:  # TimeoutError included
            self.close()
            raise DapoError(
                f"rank {rank} cannot reach the leader on {place['name']}, {address or '127.0.0.1'}:{place['port']}: "
                f"{error!r}; the machines of a run must let one another through, at any port or at "
                f"launch.heartbeat_port"
            ) from error

    def leader_says(self, what: str, value: Any = None) -> Any:
        self._doing = f"waiting for the leader's {what}"
        return self._await(what)

    def together(self, what: str) -> None:
        self._doing = f"waiting for all ranks to come to: {what}"
        self._loop.call_soon_threadsafe(self._send, {"at": what})
        self._await(what)

    def _await(self, what: str) -> Any:
        went, value = self._went.get()
        if went != what:
            raise RuntimeError(f"ranks must make the same calls: the leader has come to {went!r}, this one to {what!r}")
        self._doing = what
        return value

    def pass_on(self, signal_name: str) -> bool:
        self._say({"stop": signal_name})
        return not self._loop.is_closed() and (self._ending or not self._links[0].left)

    def tell(self, failure: Failure) -> bool:
        reason = failure.reason[-_REASON_CHARACTERS:]
        self._say({"failed": reason, "code": failure.exit_code, "late": failure.late})
        # Not to leave before the leader has spoken: whoever sees this process end may end the leader.
        return self._failed.wait(_ANSWER_SECONDS)

    async def _connect(self, rank: int, address: str, place: dict[str, Any]) -> None:
        reader, writer = await asyncio.open_connection(
            address, place["port"], limit=LINE_BYTES, happy_eyeballs_delay=0.25
        )
        link = Link(0, f"the leader, rank 0 on {place['name']},", writer, self._loop.time())
        self._links.append(link)
        self._send({"token": place["token"], "rank": rank, "host": socket.gethostname()})
        self._tasks += [asyncio.create_task(self._listen(link, reader)), asyncio.create_task(self._beat())]

    def _take(self, link: Link, message: dict[str, Any]) -> None:
        match message:
            case {"go": what, "value": value}:
                link.doing = str(what)
                self._went.put((link.doing, value))
            case {"end": int(code)}:
                link.left = True
                self._fail(lambda: Failure("", code), 0.0)
            case _:
                super()._take(link, message)
