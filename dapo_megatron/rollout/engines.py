"""All replicas of the policy, behind one synchronous door."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from dapo_megatron.config import Config
from dapo_megatron.rollout.engine import Engine, Sampling
from dapo_megatron.rollout.server import Server, answers, reserve_port
from dapo_megatron.rollout.vllm import VllmEngine, vllm_command, vllm_env
from dapo_megatron.types import Completion, Prompt

T = TypeVar("T")


class Engines:
    """Starts every replica at once and returns while they start; `wait_ready` before anything else.

    Engines are spoken to in coroutines on one event loop; `run` is the way in from plain code.

    Args:
        config: the run.
        folder: where the replicas write engine0.log, engine1.log, ...
        decode: token ids to text.
        ranks: ranks on this machine, whose GPUs are not for engines; None asks torchrun's environment.

    Raises:
        ConfigError: for a port in use, or GPUs that are not there.
    """

    def __init__(
        self, config: Config, folder: Path, decode: Callable[[Sequence[int]], str], *, ranks: int | None = None
    ) -> None:
        engine = config.engine
        self._startup_seconds = engine.startup_seconds
        self._runner = asyncio.Runner()
        self._servers: list[Server] = []
        self._load: list[int] = [0] * engine.replicas
        self._ports = []
        engines: list[Engine] = []
        try:
            for replica in range(engine.replicas):
                self._ports.append(reserve_port(engine.host, engine.port + replica if engine.port else 0))
            for replica, reserved in enumerate(self._ports):
                port = reserved.getsockname()[1]
                url = f"http://{f'[{engine.host}]' if ':' in engine.host else engine.host}:{port}"
                server = Server(
                    f"engine {replica}",
                    vllm_command(config, replica, port),
                    vllm_env(config, replica, ranks=ranks),
                    folder / f"engine{replica}.log",
                    answers(f"{url}/health"),
                )
                self._servers.append(server)
                engines.append(
                    VllmEngine(
                        server,
                        url,
                        workers=engine.tensor_parallel,
                        decode=decode,
                        request_seconds=engine.request_seconds,
                        # A request is one sequence at least, so more would only queue over there.
                        connections=engine.max_sequences,
                    )
                )
        except BaseException:
            self._end()
            raise
        self.replicas: Sequence[Engine] = tuple(engines)

    @property
    def version(self) -> int:
        """Of the weights in use: of the oldest ones, while an update goes from replica to replica."""
        return min(replica.version for replica in self.replicas)

    def wait_ready(self) -> None:
        """Block until every replica answers.

        Raises:
            EngineError: when one dies, or is not there within engine.startup_seconds.
        """
        for server in self._servers:
            server.wait_ready(self._startup_seconds)
        self._release_ports()

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
        """Sample `n` responses on the replica with the least to do."""
        least = min(range(len(self.replicas)), key=self._load.__getitem__)
        self._load[least] += n
        try:
            return await self.replicas[least].generate(prompt, sampling, n)
        finally:
            self._load[least] -= n

    def run(self, work: Coroutine[Any, Any, T], /) -> T:
        """Run a coroutine to its end. What interrupts it, Ctrl-C for example, cancels the requests in flight."""
        try:
            return self._runner.run(work)
        except BaseException:
            # An exception out of a signal handler leaves the loop, but not the tasks on it.
            self._runner.run(_cancel_others())
            raise

    def close(self) -> None:
        """End all replicas. Safe to call twice."""
        try:
            if self.replicas:
                self._runner.run(_close(self.replicas))
        finally:
            self.replicas = ()
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end(self) -> None:
        self._release_ports()
        for server in self._servers:
            server.close()
        self._runner.close()

    def _release_ports(self) -> None:
        for reserved in self._ports:
            reserved.close()


async def _close(engines: Sequence[Engine]) -> None:
    await asyncio.gather(*(engine.close() for engine in engines))


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
