"""All engines of a run, behind one synchronous door."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dapo_megatron.config import Config
from dapo_megatron.errors import EngineError
from dapo_megatron.rollout.adapter import adapter_for
from dapo_megatron.rollout.admission import Admission
from dapo_megatron.rollout.engine import Engine, Sampling
from dapo_megatron.rollout.environment import environment
from dapo_megatron.rollout.place import place
from dapo_megatron.rollout.ports import reserve_port
from dapo_megatron.rollout.server import Server, answers
from dapo_megatron.rollout.watch import watch
from dapo_megatron.types import Completion, Prompt

T = TypeVar("T")

_BATCHES = 2
"""An engine has this many times the sequences that it decodes at once: the next ones are there when some end."""


class Engines:
    """Starts every engine and returns while they start; `wait_ready` before anything else.

    Engines are spoken to in coroutines on one event loop; `run` is the way in from plain code, and watches over the
    engines meanwhile. Iterates over them.

    Args:
        config: the run.
        folder: where the engines write engine0.log, engine1.log, ...
        ranks: ranks on this machine, whose GPUs are not for engines; None asks torchrun's environment.
        at_once: False leaves starting them to `wait_ready`, which may never come.

    Raises:
        ConfigError: for a port in use, or GPUs that are not there.
    """

    def __init__(self, config: Config, folder: Path, *, ranks: int | None = None, at_once: bool = True) -> None:
        engine = config.engine
        _allow_connections()
        self._config, self._folder, self._ranks = config, folder, ranks
        self._startup_seconds, self._stall_seconds = engine.startup_seconds, engine.stall_seconds
        self._runner = asyncio.Runner()
        self._engines: list[Engine] = []
        self._servers: list[Server] = []
        self._admission = Admission(engine.count, _BATCHES * engine.max_sequences)
        self._ports: list[socket.socket] = []
        if at_once:
            self._start()

    def _start(self) -> None:
        config, engine, adapter = self._config, self._config.engine, adapter_for(self._config)
        try:
            for index in range(engine.count):
                self._ports.append(reserve_port(engine.host, engine.port + index if engine.port else 0))
            for index, reserved in enumerate(self._ports):
                where = place(config, index, reserved.getsockname()[1], self._ranks)
                server = Server(
                    where.name,
                    adapter.command(where),
                    environment(engine, where) | adapter.environment(where),
                    self._folder / f"engine{index}.log",
                    answers(f"{where.url}{adapter.health}"),
                )
                self._servers.append(server)
                self._engines.append(adapter.connect(server, where))
        except BaseException:
            self._end()
            raise

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._engines)

    @property
    def version(self) -> int:
        """Which weights are in use: the oldest ones, while new ones go from engine to engine."""
        return min(engine.version for engine in self)

    def wait_ready(self) -> None:
        """Block until every engine has written a token: some compile kernels when they are first asked for one.

        Starts them where that was left to this. Safe to call again.

        Raises:
            EngineError: when one dies, or is not there within engine.startup_seconds.
        """
        if not self._servers:
            self._start()
        for server in self._servers:
            server.wait_ready(self._startup_seconds)
        self._release_ports()
        self._run(self._write_a_token())

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
        """Sample `n` responses as soon as an engine can take them, on the one with the least to do."""
        async with self._admission.place(n) as index:
            engine = self._engines[index]
            completions = await engine.generate(prompt, sampling, n)
            if len(completions) != n or not all(completion.versions for completion in completions):
                raise EngineError(
                    f"{engine.name}: asked for {n} responses to prompt {prompt.uid}, each with the versions that wrote "
                    f"it, got {len(completions)}, {sum(not c.versions for c in completions)} of them without versions"
                )
            return completions

    def run(self, work: Coroutine[Any, Any, T], /) -> T:
        """Run a coroutine to its end. What interrupts it, Ctrl-C for example, cancels the requests in flight.

        Raises:
            EngineError: also when an engine hangs (`watch`), whatever the coroutine waits for.
        """
        return self._run(self._watched(work))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        results: list[T] = []

        async def keep() -> None:
            results.append(await work)

        try:
            # Not as the task's own result: on its way out the runner spells that, a rollout's tokens one by one.
            self._runner.run(keep())
            return results[0]
        except BaseException:
            # An exception out of a signal handler leaves the loop, but not the tasks on it.
            self._runner.run(_cancel_others())
            raise

    async def _write_a_token(self) -> None:
        prompt = Prompt("start", token_ids=(0,), text="", answer="")
        sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=1, stop_token_ids=())
        try:
            async with asyncio.timeout(self._startup_seconds):
                await asyncio.gather(*(engine.generate(prompt, sampling, 1) for engine in self))
        except TimeoutError:
            states = "\n".join(server.describe() for server in self._servers)
            raise EngineError(
                f"the engines answer, but not all have written a token within {self._startup_seconds:g} s "
                f"(engine.startup_seconds)\n{states}"
            ) from None

    async def _watched(self, work: Coroutine[Any, Any, T]) -> T:
        main = asyncio.ensure_future(work)
        watchers = [asyncio.ensure_future(self._watch(index)) for index in range(len(self._engines))]
        try:
            await asyncio.wait([main, *watchers], return_when=asyncio.FIRST_COMPLETED)
            for watcher in watchers:
                if watcher.done() and not main.done():
                    watcher.result()
            return await main
        finally:
            for task in (main, *watchers):
                task.cancel()
            await asyncio.gather(main, *watchers, return_exceptions=True)

    async def _watch(self, index: int) -> None:
        await watch(
            self._engines[index],
            self._servers[index],
            self._stall_seconds,
            writing=lambda: self._admission.held[index] > 0,
            seen=lambda progress: self._admission.finished(index, progress.finished),
        )

    def close(self) -> None:
        """End all engines. Safe to call twice."""
        engines, self._engines = self._engines, []
        try:
            if engines:
                self._runner.run(_close(engines, self._servers))
        finally:
            self._end()

    def _end(self) -> None:
        self._release_ports()
        for server in self._servers:
            server.close()
        self._runner.close()

    def _release_ports(self) -> None:
        for reserved in self._ports:
            reserved.close()


def _allow_connections() -> None:
    """Let this process have as many files as it may: every prompt that an engine works on has a connection."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _close(engines: Sequence[Engine], servers: Sequence[Server]) -> None:
    await asyncio.gather(*(engine.close() for engine in engines))
    await asyncio.gather(*(asyncio.to_thread(server.close) for server in servers))


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
