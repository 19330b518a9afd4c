"""The way of weights over CUDA IPC, but for CUDA: rooms are memory of this process, and ranks are threads of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from queue import SimpleQueue
from threading import Barrier
from typing import Any

import pytest
import torch

from dapo_megatron.errors import EngineError
from dapo_megatron.measures import Measures
from dapo_megatron.weights.buckets import Named, buckets, describe
from dapo_megatron.weights.inbox import FromRooms, Inbox
from dapo_megatron.weights.ipc import IpcPublisher
from dapo_megatron.weights.verify import Arrivals, Inventory, TransferError

WEIGHTS = {
    "embed.weight": torch.arange(40.0),  # larger than a bucket
    **{f"layers.{layer}.{name}.weight": torch.arange(8.0) + layer for layer in range(4) for name in "abc"},
    "norm.weight": torch.ones(3),
}
INVENTORY = Inventory(**describe(list(WEIGHTS.items())))
BUCKET_BYTES = 80


class Ranks:
    """Two ranks, each in a thread: calls have to be the same ones, in the same order.

    Args:
        deaf_to: what the other rank does not wait for.
    """

    def __init__(self, deaf_to: str | None = None) -> None:
        self._deaf_to = deaf_to
        self._said: list[SimpleQueue[tuple[str, Any]]] = [SimpleQueue(), SimpleQueue()]
        self._barrier = Barrier(2, timeout=10)
        self._texts = ["", ""]

    def leader_says(self, rank: int) -> Callable[[str, Any], Any]:
        def says(what: str, value: Any) -> Any:
            if what == self._deaf_to:
                return value
            if rank == 0:
                self._said[1].put((what, value))
                return value
            heard, answer = self._said[1].get(timeout=10)
            assert heard == what
            return answer

        return says

    def together(self, what: str) -> None:
        self._barrier.wait()

    def of(self, rank: int) -> Any:
        ranks = self

        class Rank:
            device = torch.device("cpu")

            def __init__(self) -> None:
                self.rank = rank

            def collect(self, text: str) -> list[str] | None:
                ranks._texts[rank] = text
                ranks._barrier.wait()
                return None if rank else ranks._texts

        return Rank()


class Memory:
    """A `Sharing` within this process."""

    made: dict[str, torch.Tensor]

    def __init__(self, rank: int, made: dict[str, torch.Tensor]) -> None:
        self._gpu, self.made = f"gpu {rank}", made
        self.settled = 0

    def make(self, nbytes: int) -> tuple[torch.Tensor, dict[str, Any]]:
        room, name = torch.full((nbytes,), 255, dtype=torch.uint8), f"{self._gpu}, {len(self.made)}"
        self.made[name] = room
        return room, {"gpu": self._gpu, "memory": name}

    def settle(self) -> None:
        self.settled += 1


class Keeper:
    """An engine on the GPU of a rank, which takes its time to copy a bucket."""

    workers, keeps = 1, True

    def __init__(self, rank: int, made: Mapping[str, torch.Tensor], seconds: float = 0.0) -> None:
        self.name, self._gpu, self._made, self._seconds = f"engine {rank}", f"gpu {rank}", made, seconds
        self.held: dict[str, torch.Tensor] = {}
        self.received: list[list[int]] = []

    async def join_group(self, info: dict[str, Any]) -> None:
        info = json.loads(json.dumps(info))
        (own,) = [handles for handles in info["rooms"] if handles[0]["gpu"] == self._gpu]
        rooms = [self._made[handle["memory"]] for handle in own]
        self._arrivals = Arrivals(info["inventory"])
        self._inbox = Inbox(FromRooms(rooms), self._arrivals, self._load, lambda: (self.held, {}))

    def _load(self, bucket: Named) -> None:
        self.held |= {name: tensor.clone() for name, tensor in bucket}

    async def begin_transfer(self) -> None:
        self._arrivals.begin()
        self._inbox.begin()
        self.received.clear()

    async def receive(self, info: dict[str, Any]) -> None:
        await asyncio.sleep(self._seconds)
        with self._named():
            self._inbox.receive(info["tensors"], info["checksums"], info["kept"], info)
        if not info["kept"]:
            self.received.append(info["tensors"])

    async def finish_transfer(self, version: int) -> None:
        with self._named():
            self._inbox.finish()
            self._arrivals.end()
            self._arrivals.loaded(self.held, {})

    def _named(self) -> Any:
        return _naming(self.name)


class _naming:  # noqa: N801  (a context manager)
    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, TransferError):
            raise EngineError(f"{self._name}, {error}") from error


class Engines:
    def __init__(self, *keepers: Keeper) -> None:
        self.keepers = list(keepers)

    def __iter__(self) -> Iterator[Keeper]:
        return iter(self.keepers)

    def run(self, work: Coroutine[Any, Any, Any], /) -> Any:
        return asyncio.run(work)


class Run:
    """Both ranks with a publisher each, and engines on the GPUs of both, or of the first."""

    def __init__(self, *, engines: int = 2, seconds: float = 0.0, deaf_to: str | None = None) -> None:
        self.made: dict[str, torch.Tensor] = {}
        self.engines = Engines(*(Keeper(rank, self.made, seconds) for rank in range(engines)))
        ranks = Ranks(deaf_to)
        self.pool = ThreadPoolExecutor(2)
        self.memories = [Memory(rank, self.made) if rank < engines else None for rank in range(2)]

        def publisher(rank: int) -> IpcPublisher:
            return IpcPublisher(
                None if rank else INVENTORY,
                None if rank else self.engines,
                BUCKET_BYTES,
                ranks.leader_says(rank),
                ranks.together,
                ranks.of(rank),
                self.memories[rank],
            )

        self._publishers = list(self.pool.map(publisher, range(2)))

    def push(self, *weights: Iterable[tuple[str, torch.Tensor]], version: int = 1) -> Measures:
        """`weights`: of each rank, the same where there is one."""
        given = weights * 2 if len(weights) == 1 else weights
        pushes = [
            self.pool.submit(publisher.push, list(own), version)
            for publisher, own in zip(self._publishers, given, strict=True)
        ]
        error = pushes[1].exception()
        assert error is None, error
        return pushes[0].result()

    def close(self) -> None:
        for publisher in self._publishers:
            publisher.close()
        self.pool.shutdown()

    def check(self, weights: Mapping[str, torch.Tensor]) -> None:
        for keeper in self.engines:
            assert all(torch.equal(keeper.held[name], tensor) for name, tensor in weights.items()), keeper.name


def changed(*names: str, by: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: tensor + by if name in names else tensor for name, tensor in WEIGHTS.items()}


def test_each_engine_copies_from_the_rank_on_its_gpu() -> None:
    with closing(Run()) as run:
        assert run.push(WEIGHTS.items())["push/share"].value == 1
        run.check(WEIGHTS)
        sizes = {len(room) for room in run.made.values()}
        assert len(run.made) == 4 and sizes == {160}  # that of the largest tensor
        count = len(list(buckets(WEIGHTS.items(), BUCKET_BYTES)))
        assert [memory and memory.settled for memory in run.memories] == [count, count]


def test_a_rank_whose_weights_are_others_is_found_out() -> None:
    with (
        closing(Run()) as run,
        pytest.raises(EngineError, match=r"engine 1, layers.2.b.weight has arrived with other bytes than were sent"),
    ):
        run.push(WEIGHTS.items(), changed("layers.2.b.weight").items())


def test_a_rank_without_an_engine_takes_part() -> None:
    with closing(Run(engines=1)) as run:
        run.push(WEIGHTS.items())
        run.check(WEIGHTS)
        assert len(run.made) == 2


def test_a_room_is_not_used_again_before_the_engines_have_copied() -> None:
    with closing(Run(seconds=0.05)) as run:
        run.push(WEIGHTS.items())
        run.check(WEIGHTS)


def test_a_rank_that_uses_a_room_too_early_is_found_out() -> None:
    with (
        closing(Run(seconds=0.05, deaf_to="room for weights")) as run,
        pytest.raises(EngineError, match=r"engine 1, .* has arrived with other bytes than were sent"),
    ):
        run.push(WEIGHTS.items())


def test_layers_that_have_not_changed_are_not_copied() -> None:
    with closing(Run()) as run:
        run.push(WEIGHTS.items())
        assert run.push(WEIGHTS.items())["push/share"].value == 0
        # The last of its layer: that is seen after its first tensors have gone by.
        weights = changed("layers.2.c.weight")
        share = run.push(weights.items())["push/share"].value
        run.check(weights)
        assert share == 3 * 32 / sum(INVENTORY.sizes)
        sent = sorted(index for bucket in run.engines.keepers[1].received for index in bucket)
        assert [INVENTORY.names[index] for index in sent] == [f"layers.2.{name}.weight" for name in "abc"]


def test_after_a_push_that_broke_off_everything_is_sent() -> None:
    with closing(Run()) as run:
        run.push(WEIGHTS.items())
        with pytest.raises(EngineError, match=r"engine 1, embed.weight has arrived with other bytes"):
            run.push(changed(*WEIGHTS).items(), WEIGHTS.items())
        weights = changed("norm.weight")
        assert run.push(weights.items())["push/share"].value == 1
        run.check(weights)


def test_an_engine_that_was_started_again_opens_the_same_rooms() -> None:
    with closing(Run()) as run:
        run.push(WEIGHTS.items())
        run.engines.keepers[1] = Keeper(1, run.made)
        assert run.push(WEIGHTS.items())["push/share"].value == 1
        run.check(WEIGHTS)
        assert len(run.made) == 4
