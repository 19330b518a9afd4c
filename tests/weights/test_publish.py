"""The publisher on the leader and on another rank, over a real gloo group to engines that only keep what they get."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
import torch

from dapo_megatron.config import WeightsConfig
from dapo_megatron.errors import EngineError
from dapo_megatron.weights.buckets import allocate, unflatten
from dapo_megatron.weights.gloo import GlooPublisher, join_group, transmit
from dapo_megatron.weights.publish import open_publisher

WEIGHTS = {f"w{index}": torch.full((index, 3), index, dtype=torch.bfloat16) for index in range(1, 6)}


class Keeper:
    """One worker that keeps the weights of every version."""

    workers = 1

    def __init__(self, name: str, *, joins: bool = True) -> None:
        self.name, self.joins = name, joins
        self.held: dict[int, dict[str, torch.Tensor]] = {}

    async def join_group(self, info: dict[str, Any]) -> None:
        if not self.joins:
            raise EngineError(f"{self.name} does not join")
        offset = info.pop("rank_offset")
        self.group = await asyncio.to_thread(lambda: join_group(rank=offset, **info))

    async def begin_transfer(self) -> None:
        self.coming: dict[str, torch.Tensor] = {}

    async def receive(self, info: dict[str, Any]) -> None:
        flat = allocate(info["dtypes"], info["shapes"])
        await asyncio.to_thread(transmit(self.group, flat).wait)
        self.coming |= unflatten(flat, **info)

    async def finish_transfer(self, version: int) -> None:
        self.held[version] = self.coming


class Keepers:
    def __init__(self, *keepers: Keeper) -> None:
        self.keepers = keepers

    def __iter__(self) -> Iterator[Keeper]:
        return iter(self.keepers)

    def run(self, work: Coroutine[Any, Any, Any], /) -> Any:
        return asyncio.run(work)


def test_the_leader_sends_to_all_engines() -> None:
    keepers = Keepers(Keeper("engine 0"), Keeper("engine 1"))
    publisher = GlooPublisher(keepers, bucket_bytes=64, timeout_seconds=20)
    publisher.push(WEIGHTS.items(), version=1)
    publisher.push(((name, -tensor) for name, tensor in WEIGHTS.items()), version=5)
    publisher.close()
    publisher.close()
    for keeper in keepers:
        assert list(keeper.held) == [1, 5]
        for sign, held in zip((1, -1), keeper.held.values(), strict=True):
            assert held.keys() == WEIGHTS.keys()
            assert all(torch.equal(held[name], sign * tensor) for name, tensor in WEIGHTS.items())


def test_another_rank_takes_part_in_gathering() -> None:
    gathered: list[str] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in WEIGHTS.items():
            gathered.append(name)
            yield name, tensor

    publisher = open_publisher(WeightsConfig(), None)
    publisher.push(weights(), version=1)
    assert gathered == list(WEIGHTS)
    publisher.close()


def test_an_engine_that_does_not_join_is_an_error_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(EngineError, match="engine 0 does not join"):
        open_publisher(WeightsConfig(), Keepers(Keeper("engine 0", joins=False)))
    assert time.monotonic() - started < 5


def test_a_push_that_fails_does_not_count() -> None:
    class Full(Keeper):
        async def begin_transfer(self) -> None:
            raise EngineError(f"{self.name} is full")

    publisher = open_publisher(WeightsConfig(), Keepers(Full("engine 0")))
    with pytest.raises(EngineError, match="engine 0 is full"):
        publisher.push(WEIGHTS.items(), version=1)
