"""A process that takes weights as an engine's worker does, with the same accounts, and nothing of an engine.

It loads what comes by copying it into parameters of its own, as an engine that keeps tensors as they come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from dapo_megatron.errors import EngineError
from dapo_megatron.weights.buckets import Named
from dapo_megatron.weights.checksum import checksums
from dapo_megatron.weights.group import Group, join_group
from dapo_megatron.weights.handles import open_own
from dapo_megatron.weights.inbox import FromGroup, FromRooms, Inbox, Source
from dapo_megatron.weights.verify import Arrivals


class StandIn:
    """An engine as the publisher sees it, in a process of its own.

    Args:
        device: of its parameters, and where buckets arrive.
    """

    name, workers, keeps = "stand-in", 1, True

    def __init__(self, device: str = "cpu") -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, device), daemon=True)
        self._process.start()
        self.done()  # it has imported torch, before any limit begins to run

    async def join_group(self, info: dict[str, Any]) -> None:
        await self._ask("join", info)

    async def begin_transfer(self) -> None:
        await self._ask("begin")

    async def receive(self, info: dict[str, Any]) -> None:
        await self._ask(
            "receive", {key: value for key, value in info.items() if key not in ("names", "dtypes", "shapes")}
        )

    async def finish_transfer(self, version: int) -> None:
        await self._ask("finish")

    def sums(self) -> dict[str, int]:
        """Return the checksum of every parameter that it has."""
        self.start("sums")
        return self.done()

    def cpu_seconds(self) -> float:
        """Of this process and that of the engine."""
        self.start("cpu_seconds")
        return time.process_time() + self.done()

    def start(self, what: str, info: Any = None) -> None:
        """Have it do something (`Worker`), until `done`."""
        self._pipe.send((what, info))

    def done(self) -> Any:
        error, answer = self._pipe.recv()
        if error:
            raise EngineError(f"{self.name}, {error}")
        return answer

    async def _ask(self, what: str, info: Any = None) -> Any:
        self.start(what, info)
        loop, answered = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._pipe.fileno(), answered.set)
        try:
            await answered.wait()
        finally:
            loop.remove_reader(self._pipe.fileno())
        return self.done()

    def close(self) -> None:
        self._process.kill()
        self._process.join()


class OneEngine:
    """`Receivers` without watchers."""

    def __init__(self, engine: StandIn) -> None:
        self._engine, self._runner = engine, asyncio.Runner()

    def __iter__(self) -> Iterator[StandIn]:
        return iter([self._engine])

    def run(self, work: Coroutine[Any, Any, Any], /) -> Any:
        return self._runner.run(work)


class OneRank:
    """The only rank of a run (`weights.publish.Ranks`)."""

    rank = 0

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def collect(self, text: str) -> list[str]:
        return [text]


class Worker:
    """The stand-in's side, with the calls that vLLM's worker gets (`weights.workers.vllm`)."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._group: Group | None = None
        self._room = torch.zeros(0, dtype=torch.uint8)

    def join(self, info: Mapping[str, Any]) -> None:
        inventory = info["inventory"]
        self._arrivals = Arrivals(inventory, self._device)
        self._inbox = Inbox(self._source(dict(info)), self._arrivals, self._load, lambda: (self._parameters, {}))
        self._parameters = {
            name: torch.zeros(shape, dtype=getattr(torch, dtype), device=self._device)
            for name, dtype, shape in zip(inventory["names"], inventory["dtypes"], inventory["shapes"], strict=True)
        }

    def _source(self, info: dict[str, Any]) -> Source:
        del info["inventory"]
        if rooms := info.get("rooms"):
            return FromRooms(open_own(rooms, self._device))
        self._group = join_group(rank=info.pop("rank_offset"), device=self._device, **info)
        return FromGroup(self._group)

    def _load(self, bucket: Named) -> None:
        for name, tensor in bucket:
            self._parameters[name].copy_(tensor)

    def begin(self, _: None) -> None:
        self._arrivals.begin()
        self._inbox.begin()

    def receive(self, info: Mapping[str, Any]) -> None:
        self._inbox.receive(info["tensors"], info["checksums"], info["kept"], info)

    def finish(self, _: None) -> None:
        self._inbox.finish()
        self._arrivals.end()
        self._arrivals.loaded(self._parameters, {})

    def sums(self, _: None) -> dict[str, int]:
        return dict(zip(self._parameters, checksums(list(self._parameters.values())), strict=True))

    def cpu_seconds(self, _: None) -> float:
        return time.process_time()

    def plain(self, nbytes: int) -> None:
        """Take part in a plain broadcast into a buffer that is there."""
        assert self._group
        if nbytes > len(self._room):
            self._room = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
        self._group.wait([self._group.transmit(self._room[:nbytes])])
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _work(pipe: Connection, device: str) -> None:
    torch.set_num_threads(1)
    if device != "cpu":
        torch.cuda.set_device(device)
    worker = Worker(device)
    pipe.send((None, "ready"))
    while True:
        try:
            what, info = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, getattr(worker, what)(info)))
        except Exception as error:  # told to the leader, whatever it is
            pipe.send((f"{type(error).__name__}: {error}", None))


def random_weights(shapes: Mapping[str, tuple[int, ...]], device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Return bfloat16 tensors of these shapes."""
    generator = torch.Generator(device).manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, device=device).bfloat16() for name, shape in shapes.items()}
