"""The leader's end: it listens, says when the others may go on, and why a run ends."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Any

from dapo_megatron.errors import ConfigError, DapoError
from dapo_megatron.heartbeat.peers import SETTLE_SECONDS, Failure, Store
from dapo_megatron.heartbeat.watch import LINE_BYTES, NAMED, Link, Watch, enumerated

log = logging.getLogger(__name__)

_REMIND_SECONDS = 60.0
"""After which it is said who is waited for; then after twice as long, and so on."""


class Leader(Watch):
    def __init__(
        self,
        store: Store,
        world_size: int,
        on_failure: Callable[[Failure], None],
        on_stop: Callable[[str, str], None],
        address: str | None,
        lost_seconds: float,
        join_seconds: float,
        port: int,
    ) -> None:
        listener = _listener(store, address, port)
        super().__init__(on_failure, lost_seconds)
        self._on_stop = on_stop
        self._token = secrets.token_hex(32)
        self._missing = set(range(1, world_size))
        self._complete = asyncio.Event()
        self._arrivals = threading.Condition()
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
                f"ranks {sorted(self._missing)} of {world_size} did not come within launch.join_seconds"
                f"({join_seconds:g}): look at what they or their machines say"
            ) from error

    def leader_says(self, what: str, value: Any = None) -> Any:
        self._doing = what
        self._loop.call_soon_threadsafe(self._send, {"go": what, "value": value})
        return value

    def together(self, what: str) -> None:
        self._doing = f"waiting for all ranks to come to: {what}"
        pause = _REMIND_SECONDS
        with self._arrivals:
            while late := [link for link in self._links if link.come_to != what]:
                if stray := next((link for link in late if link.come_to), None):
                    raise RuntimeError(
                        f"ranks must make the same calls: {stray.name} has come to {stray.come_to!r}, the leader to "
                        f"{what!r}"
                    )
                if not self._arrivals.wait(pause):
                    names = enumerated([link.name for link in late])
                    log.warning("%d of %d ranks have yet to come to: %s: %s", len(late), len(self._links), what, names)
                    pause *= 2
            for link in self._links:
                link.come_to = None
        self.after_leader(what)

    def whereabouts(self) -> str:
        ranks: dict[str, list[str]] = {}
        for link in self._links:
            ranks.setdefault(link.doing, []).append(link.name)
        fewest = sorted(ranks.items(), key=lambda entry: len(entry[1]))
        lines = [f"\n  {doing}: {enumerated(names)}" for doing, names in fewest[:NAMED]]
        return "\nranks had come to:" + "".join(lines) + ("\n  ..." if len(fewest) > NAMED else "")

    def tell(self, failure: Failure) -> bool:
        self._ending = True
        self._say({"end": failure.exit_code})
        return False

    async def _gather(self, listener: socket.socket) -> None:
        server = await asyncio.start_server(self._accept, sock=listener, limit=LINE_BYTES)
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
        link = Link(rank, f"rank {rank} on {host}", writer, self._loop.time())
        self._links.append(link)
        self._tasks.append(asyncio.create_task(self._listen(link, reader)))
        if not self._missing:
            self._complete.set()

    def _take(self, link: Link, message: dict[str, Any]) -> None:
        match message:
            case {"at": what}:
                with self._arrivals:
                    link.come_to = str(what)
                    self._arrivals.notify_all()
            case {"stop": name}:
                # In a thread of its own, for this one goes on beating.
                threading.Thread(target=self._on_stop, args=(str(name), link.name), daemon=True).start()
            case {"failed": reason, "code": int(code), "late": bool(late)}:
                self._fail(lambda: Failure(f"{link.name}: {reason}", code, late), SETTLE_SECONDS)
            case _:
                super()._take(link, message)


def _listener(store: Store, address: str | None, port: int) -> socket.socket:
    try:
        if address is None:
            return socket.create_server(("127.0.0.1", port))
        # On all interfaces: the address that others know may be none of this machine's. Strangers lack the token.
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        store.set("heartbeat", json.dumps({"end": ConfigError.exit_code}))
        raise ConfigError(
            f"launch.heartbeat_port: the leader, on {socket.gethostname()}, cannot listen on port {port}: "
            f"{error.strerror}; end what uses it, choose another, or set launch.heartbeat_port=null for any free one"
        ) from error
