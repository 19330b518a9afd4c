"""Keeps two runs from using one engine at a time: its server serves the run that holds its lease, and no other.

A run takes the lease before its first request and renews it every BEAT_SECONDS, from a thread, since its event loop
stands still while it trains. It gives it back when it ends; where it was killed, the lease runs out.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from http.client import HTTPException
from typing import Any

from dapo_megatron.errors import EngineError
from dapo_megatron.rollout.answer import LEASE
from dapo_megatron.rollout.server import DIRECT
from dapo_megatron.rollout.token import authorization

RUN = "Dapo-Megatron-Run"
"""Header of every request: the run that makes it."""
LEASE_SECONDS = 60.0
"""Without a word from its holder after which a lease is free."""
BEAT_SECONDS = 10.0
_ANSWER_SECONDS = 5.0
_LOOK_SECONDS = 1.0
_CLOSE_SECONDS = 2.0
_UNKNOWN = {404, 405, 501}
"""What servers answer that keep no lease: those of an adapter of somebody's own."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """A run that uses an engine.

    >>> Tenant("5c1f09aa37e2b4d8", "run math, process 4242 on node7", "http://node2:8000").owner
    'run math, process 4242 on node7'
    """

    run: str
    """Names it among all runs."""
    owner: str
    """For people."""
    url: str
    """Where it finds the engine. One that it finds in two places would count twice."""


class Lease:
    """On the side of the server: who may use it. Several threads must not share it.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._holder: Tenant | None = None
        self._heard = 0.0

    def take(self, tenant: Tenant) -> dict[str, Any] | None:
        """Give the lease to a run, or renew it.

        Returns:
            None, or where another run has it, its "owner" and the "seconds" since it was heard from; or where this run
            has found it in another place, that "url" as well.
        """
        if holder := self._other_than(tenant.run):
            return {"owner": holder.owner, "seconds": self._clock() - self._heard}
        if self._holder and self._holder.run == tenant.run and self._holder.url != tenant.url:
            return {"owner": tenant.owner, "seconds": self._clock() - self._heard, "url": self._holder.url}
        self._holder, self._heard = tenant, self._clock()
        return None

    def give_back(self, run: str) -> None:
        if self._holder and self._holder.run == run:
            self._holder = None

    def refusal(self, run: str) -> str | None:
        """Return why a request of `run` ("" for none) is not served, for people; None where it is, and is heard."""
        if holder := self._other_than(run):
            return (
                f"in use by {holder.owner}, and this request is not that run's; the engine is free once that has "
                f"ended, or was not heard from for {LEASE_SECONDS:g} s"
            )
        if self._holder and self._holder.run == run:
            self._heard = self._clock()
        return None

    def _other_than(self, run: str) -> Tenant | None:
        holder = self._holder
        heard = self._clock() - self._heard < LEASE_SECONDS
        return holder if holder and holder.run != run and heard else None


class Hold:
    """On the side of a run: takes the lease of an engine and keeps it until `close`.

    Args:
        name: of the engine, used in messages.
        token: that of its server.
    """

    def __init__(self, name: str, token: str, tenant: Tenant) -> None:
        self._name, self._token, self._tenant = name, token, tenant
        self.run = tenant.run
        self._over = threading.Event()
        self._keeper: threading.Thread | None = None

    async def take(self) -> None:
        """Return once the lease is this run's. One of a run that was killed runs out meanwhile.

        Raises:
            EngineError: as soon as another run that has it is heard from, or where this run has it by another URL.
        """
        silent = 0.0
        while found := await asyncio.to_thread(self._ask):
            if url := found.get("url"):
                raise EngineError(
                    f"{self._name} and {url} are one engine; an engine counts once: take one of them out of engine.urls"
                )
            if found["seconds"] < silent:  # it was heard from since the last look
                raise EngineError(
                    f"{self._name} is in use by {found['owner']}, which was heard from {found['seconds']:.0f} s ago; "
                    f"wait until that run has ended, or give other engine.urls"
                )
            silent = found["seconds"]
            await asyncio.sleep(_LOOK_SECONDS)
        if not self._keeper:
            self._keeper = threading.Thread(target=self._keep, daemon=True)
            self._keeper.start()

    def let_go(self) -> None:
        """Begin to give the lease back."""
        self._over.set()

    def close(self) -> None:
        """Give the lease back, as far as the engine answers. Safe to call twice."""
        self.let_go()
        if self._keeper:
            self._keeper.join(_CLOSE_SECONDS)

    def _keep(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with suppress(EngineError):  # it is away, or another run's: who uses it hears of that
                self._ask()
        with suppress(OSError, HTTPException):
            self._send("DELETE", {})

    def _ask(self) -> dict[str, Any] | None:
        """Ask for the lease. Returns who has it; None where this run has it, or the server keeps none.

        Raises:
            EngineError: where the engine does not answer, or nothing that can be read.
        """
        try:
            return json.loads(self._send("POST", asdict(self._tenant)))
        except urllib.error.HTTPError as error:
            if error.code in _UNKNOWN:
                return None
            raise EngineError(f"{self._name}, {LEASE}: HTTP {error.code}: {error.read(500)!r}") from error
        except (OSError, HTTPException, ValueError) as error:
            raise EngineError(f"{self._name}, {LEASE}: {error}") from error

    def _send(self, method: str, body: dict[str, Any]) -> bytes:
        headers = {"Authorization": authorization(self._token), RUN: self._tenant.run}
        request = urllib.request.Request(
            f"{self._tenant.url}{LEASE}", json.dumps(body).encode(), headers, method=method
        )
        with DIRECT.open(request, timeout=_ANSWER_SECONDS) as response:
            return response.read(10_000)
