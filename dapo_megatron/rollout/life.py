"""One engine of a run, in as many lives as it takes."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from dapo_megatron.config import Config
from dapo_megatron.errors import EngineError
from dapo_megatron.rollout.about import KIND, About, check, needed
from dapo_megatron.rollout.adapter import EngineAdapter
from dapo_megatron.rollout.engine import Sampling
from dapo_megatron.rollout.environment import environment
from dapo_megatron.rollout.lease import Hold
from dapo_megatron.rollout.nodes import Nodes
from dapo_megatron.rollout.place import Place, elsewhere, place
from dapo_megatron.rollout.server import POLL_SECONDS, Server, ServerElsewhere, StartedServer, answers
from dapo_megatron.types import Prompt

T = TypeVar("T")

_FIRST_WORDS = Prompt("start", token_ids=(0,), text="", answer="")


def start_server(
    config: Config, adapter: EngineAdapter, where: Place, log: Path, token: str | None, name: str
) -> StartedServer:
    """Start the engine that has the place `where` on this machine; `name` is for messages."""
    return StartedServer(
        name,
        adapter.command(where),
        environment(config.engine, where) | adapter.environment(where) | {KIND: config.engine.kind},
        log,
        answers(f"{where.url}{adapter.health}"),
        token,
    )


class Life:
    """An engine from its start to its failure.

    Args:
        port: where it is to listen, as `reserve_port` keeps it; None where another machine's processes have it.
        log: file to which its output is added.
        ranks: as `place` has it.
        token: what it is to be asked with; None makes one for an engine that is started.
        hold: on an engine that runs already; it is taken, and outlasts this life.
        nodes: the run's other machines, one of which may be the engine's.

    Attributes:
        url: where it answers.
        ready: whether it has written a token.
        failure: why it is of no use any more; None as long as it is.
    """

    def __init__(
        self,
        config: Config,
        adapter: EngineAdapter,
        index: int,
        port: socket.socket | None,
        log: Path,
        ranks: int | None,
        token: str | None,
        *,
        hold: Hold | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        self._port, self._startup_seconds = port, config.engine.startup_seconds
        self._hold = hold
        self._needed: About | None = None
        self.server: Server
        if port:
            where = place(config, index, port.getsockname()[1], ranks)
            self.server = start_server(config, adapter, where, log, token, where.name)
        elif nodes and index in nodes:
            where = nodes.place(index)
            self.server = nodes.start(index, answers(f"{where.url}{adapter.health}"))
        else:
            assert token and hold
            where = elsewhere(config, index)
            is_there = answers(f"{where.url}{adapter.health}")
            self.server = ServerElsewhere(where.name, where.url, token, is_there, hold.run)
            self._needed = needed(config, config.engine.kind_of(index))
        self.url = where.url
        self.engine = adapter.connect(self.server, where)
        self.ready = False
        self.failure: EngineError | None = None
        self._gone = asyncio.Event()
        self._ending = threading.Lock()

    def fail(self, error: EngineError) -> None:
        """Take note that it is of no use any more. The first failure counts."""
        self.failure = self.failure or error
        self._gone.set()

    async def with_it(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, which asks this engine, as long as the engine lives.

        Raises:
            EngineError: its failure.
        """
        working, gone = asyncio.ensure_future(work), asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
            if self.failure and (not working.done() or working.exception()):
                raise self.failure  # whatever its end came to for this work
            return await working
        finally:
            for task in (working, gone):
                task.cancel()
            await asyncio.gather(working, gone, return_exceptions=True)

    async def come_up(self) -> None:
        """Return when the engine has written a token: some compile kernels when they are first asked for one.

        Raises:
            EngineError: when it dies, is not there within engine.startup_seconds, serves another model, or another run.
        """
        if self.ready:
            return
        while not await asyncio.to_thread(self.server.ready, self._startup_seconds):
            await asyncio.sleep(POLL_SECONDS)
        self._let_go()
        if self._needed and self._hold:
            check(self.server.name, await self.engine.about(), self._needed)
            await self._hold.take()
            await self.engine.reset()
        sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=1, stop_token_ids=())
        try:
            async with asyncio.timeout(self._startup_seconds):
                await self.engine.generate(_FIRST_WORDS, sampling, 1)
        except TimeoutError:
            raise EngineError(
                f"{self.server.name} answers, but has not written a token within {self._startup_seconds:g} s "
                f"(engine.startup_seconds)\n{self.server.describe()}"
            ) from None
        self.ready = True

    async def close(self) -> None:
        await self.engine.close()
        await asyncio.to_thread(self.end)

    def end(self) -> None:
        """End its processes. Safe to call twice: the second call waits for the first."""
        with self._ending:
            self._let_go()
            self.server.close()

    def _let_go(self) -> None:
        if self._port:
            self._port.close()
