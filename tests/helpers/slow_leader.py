"""A rank under torchrun that trains for real, with a leader that takes SECONDS for whatever it does alone, and to read.

`-m tests.helpers.slow_leader SECONDS CONFIG ...`: engines live in the leader's process, answer at random and keep the
weights. With SECONDS 0, one fails at the second bucket of a push.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from dapo_megatron import leader, rank, train
from dapo_megatron.errors import EngineError
from dapo_megatron.measures import Measures
from dapo_megatron.processes import leave
from dapo_megatron.rollout.engine import Sampling
from dapo_megatron.types import Completion, Prompt, VersionSpan
from dapo_megatron.weights import hf, shards
from dapo_megatron.weights.broadcast import BroadcastPublisher
from tests.helpers.completions import completion
from tests.weights.test_publish import Keeper

SECONDS = float(sys.argv[1])
BYTES = 100_000
"""Of a bucket, and of a shard: the model has several."""


class SlowKeeper(Keeper):
    received = version = 0

    async def receive(self, info: dict[str, Any]) -> None:
        self.received += 1
        await asyncio.sleep(SECONDS)
        if self.received == 2 and not SECONDS:
            raise EngineError(f"{self.name} broke at bucket {self.received}")
        await super().receive(info)

    async def begin_transfer(self) -> None:
        await asyncio.sleep(SECONDS)
        await super().begin_transfer()

    async def finish_transfer(self, version: int) -> None:
        await asyncio.sleep(SECONDS)
        await super().finish_transfer(version)
        self.version = version
        print(f"buckets of version {version}: {self.received}")

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
        await asyncio.sleep(SECONDS)
        tokens = [random.choices(range(1, 14), k=random.randint(1, sampling.max_tokens)) for _ in range(n)]
        return [completion(ids, [-2.5] * len(ids), versions=[VersionSpan(self.version, 0, len(ids))]) for ids in tokens]


class SlowEngines:
    """Stands in for `rollout.engines.Engines`."""

    def __init__(self, *_: object, **more: object) -> None:
        self._runner = asyncio.Runner()
        self._keeper = SlowKeeper("engine 0")

    def __iter__(self) -> Iterator[SlowKeeper]:
        return iter([self._keeper])

    refill = None
    address = "127.0.0.1"

    @property
    def version(self) -> int:
        return self._keeper.version

    def expect(self, version: int) -> None: ...

    def recover(self, error: EngineError) -> None:
        """There is no other engine that could be started."""
        raise error

    def take_measures(self) -> Measures:
        return {}

    def waits(self) -> str:
        return ""

    def wait_ready(self) -> None:
        time.sleep(SECONDS)

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
        return await self._keeper.generate(prompt, sampling, n)

    def run(self, work: Coroutine[Any, Any, Any], /) -> Any:
        return self._runner.run(work)

    sample = run

    def ask(self, question: Callable[[SlowKeeper], Coroutine[Any, Any, Any]]) -> list[Any]:
        return [self.run(question(self._keeper))]

    def close(self) -> None:
        self._runner.close()


def save_slowly(tensors: dict[str, Any], *arguments: Any, **more: Any) -> None:
    time.sleep(SECONDS)
    print(f"a shard of {len(tensors)} tensors")
    save_file(tensors, *arguments, **more)


def read_slowly(*arguments: Any) -> None:
    time.sleep(SECONDS)
    fill(*arguments)


if __name__ == "__main__":
    fill, hf.fill = hf.fill, read_slowly
    save_file = shards.save_file
    shards.save_file, hf._SHARD_BYTES = save_slowly, BYTES
    leader.Engines = SlowEngines  # pyright: ignore[reportAttributeAccessIssue]
    train.open_publisher = lambda config, inventory, receivers, says, **_: BroadcastPublisher(
        inventory, receivers, BYTES, says, timeout_seconds=config.push_seconds
    )
    leave(rank.main(sys.argv[2:]))
