"""The publisher on the leader and on another rank, over a real gloo group to engines that only keep what they get."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import pytest
import torch

from dapo_megatron.config import WeightsConfig
from dapo_megatron.errors import EngineError
from dapo_megatron.measures import Measures
from dapo_megatron.weights.buckets import Named, describe
from dapo_megatron.weights.gloo import GlooPublisher, join_group, transmit
from dapo_megatron.weights.publish import open_publisher
from dapo_megatron.weights.verify import Arrivals, Inventory, TransferError

WEIGHTS = {f"w{index}": torch.full((index, 3), index, dtype=torch.bfloat16) for index in range(1, 6)}
INVENTORY = Inventory(**describe(list(WEIGHTS.items())))


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
        self.arrivals = Arrivals(info.pop("inventory"))
        self.group = await asyncio.to_thread(lambda: join_group(rank=offset, **info))

    async def begin_transfer(self) -> None:
        self.coming: dict[str, torch.Tensor] = {}
        self.arrivals.begin()

    async def receive(self, info: dict[str, Any]) -> None:
        with self.telling():
            flat = self.arrivals.allocate(info["tensors"])
            await asyncio.to_thread(transmit(self.group, flat).wait)
            self.load(self.arrivals.unpack(self.arrived(flat), info["tensors"], info["checksums"]))

    async def finish_transfer(self, version: int) -> None:
        with self.telling():
            self.arrivals.end()
            self.arrivals.loaded(self.coming, {})
        self.held[version] = self.coming

    def arrived(self, flat: torch.Tensor) -> torch.Tensor:
        """The bytes of a bucket, once they are here."""
        return flat

    def load(self, bucket: Named) -> None:
        self.coming |= dict(bucket)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """An engine's client names it in whatever its workers say."""
        try:
            yield
        except TransferError as error:
            raise EngineError(f"{self.name}, {error}") from error


class Keepers:
    def __init__(self, *keepers: Keeper) -> None:
        self.keepers = keepers

    def __iter__(self) -> Iterator[Keeper]:
        return iter(self.keepers)

    def run(self, work: Coroutine[Any, Any, Any], /) -> Any:
        return asyncio.run(work)


def test_the_leader_sends_to_all_engines() -> None:
    keepers = Keepers(Keeper("engine 0"), Keeper("engine 1"))
    publisher = GlooPublisher(INVENTORY, keepers, bucket_bytes=64, timeout_seconds=20)
    publisher.push(WEIGHTS.items(), version=1)
    publisher.push(((name, -tensor) for name, tensor in WEIGHTS.items()), version=5)
    publisher.close()
    publisher.close()
    for keeper in keepers:
        assert list(keeper.held) == [1, 5]
        for sign, held in zip((1, -1), keeper.held.values(), strict=True):
            assert held.keys() == WEIGHTS.keys()
            assert all(torch.equal(held[name], sign * tensor) for name, tensor in WEIGHTS.items())


def push(keeper: Keeper, weights: Iterable[tuple[str, torch.Tensor]], *, version: int = 1, **changes: Any) -> Measures:
    config = WeightsConfig(push_seconds=5.0, **changes)
    with closing(open_publisher(config, INVENTORY, Keepers(Keeper("engine 0"), keeper))) as publisher:
        return publisher.push(weights, version=version)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([*WEIGHTS.items()][:3], "a push has left out w4, w5; the model has 5 tensors"),
        ([*WEIGHTS.items(), ("w2", WEIGHTS["w2"])], "a push brings w2 twice"),
        ([*WEIGHTS.items(), ("w6", WEIGHTS["w2"])], "the model has no w6"),
        ([("w1", WEIGHTS["w1"].T)], r"w1 is bfloat16 \[3, 1\], and the model has bfloat16 \[1, 3\]"),
    ],
)
def test_a_push_that_is_not_the_model_is_refused(weights: Named, says: str) -> None:
    keeper = Keeper("engine 1")
    with pytest.raises(EngineError, match=says):
        push(keeper, weights)
    assert not keeper.held


@pytest.mark.parametrize(("verify", "caught"), [("checksums", True), ("off", False)])
def test_a_bit_that_is_flipped_on_the_way_is_caught_with_tensor_and_engine(verify: str, caught: bool) -> None:
    class Unlucky(Keeper):
        def arrived(self, flat: torch.Tensor) -> torch.Tensor:
            flat[-1] ^= 1
            return flat

    unlucky = Unlucky("engine 1")
    with pytest.raises(EngineError, match=r"engine 1, w\d has arrived with other bytes") if caught else nullcontext():
        push(unlucky, WEIGHTS.items(), verify=verify)
    assert bool(unlucky.held) != caught


def test_an_engine_whose_announcements_do_not_come_as_they_were_sent_is_named() -> None:
    class Forgetful(Keeper):
        async def receive(self, info: dict[str, Any]) -> None:
            await super().receive({**info, "tensors": [0] * len(info["tensors"])})

    with pytest.raises(EngineError, match="engine 1, a push brings w1 twice"):
        push(Forgetful("engine 1"), WEIGHTS.items())


def test_a_buffer_that_is_reused_too_early_is_caught() -> None:
    class Frugal(Keeper):
        """Has one buffer for all buckets, and, as vLLM, puts tensors to use when all of a layer are there."""

        buffer = torch.empty(1000, dtype=torch.uint8)

        def arrived(self, flat: torch.Tensor) -> torch.Tensor:
            return self.buffer[: len(flat)].copy_(flat)

    with (
        closing(GlooPublisher(INVENTORY, Keepers(Frugal("engine 1")), 20, timeout_seconds=5)) as publisher,
        pytest.raises(
            EngineError, match="engine 1, w1, w2 was overwritten in this process before the engine had loaded"
        ),
    ):
        publisher.push(WEIGHTS.items(), version=1)


def test_an_engine_that_reports_success_and_kept_the_old_weights_is_caught() -> None:
    class Lazy(Keeper):
        def load(self, bucket: Named) -> None:
            self.coming |= {name: self.held[1][name] if 1 in self.held else tensor for name, tensor in bucket}

    lazy = Lazy("engine 0")
    with closing(GlooPublisher(INVENTORY, Keepers(lazy), 64, timeout_seconds=5)) as publisher:
        measures = publisher.push(WEIGHTS.items(), version=1)
        assert measures["verify/tensors"].value == 5 and measures["seconds/verify"].value > 0
        with pytest.raises(
            EngineError, match="engine 0, w1, w2, w3 and 2 more: the engine has loaded the push, and has"
        ):
            publisher.push(((name, -tensor) for name, tensor in WEIGHTS.items()), version=2)


def test_all_ranks_wait_for_the_leader_before_they_gather_the_same_weights() -> None:
    seen: dict[str, list[str]] = {}
    for rank, receivers in (("leader", Keepers(Keeper("engine 0"))), ("other", None)):
        happened = seen[rank] = []

        def weights(happened: list[str] = happened) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in WEIGHTS.items():
                happened.append(name)
                yield name, tensor

        publisher = GlooPublisher(INVENTORY, receivers, 64, happened.append, timeout_seconds=20)
        publisher.push(weights(), version=1)
        publisher.close()
    assert seen["leader"] == seen["other"] == ["bucket", "w1", "w2", "w3", "w4", "w5", "bucket"]


def test_another_rank_holds_one_tensor_at_a_time() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(4):
            assert all(tensor() is None for tensor in held[:-1])
            tensor = torch.zeros(100)
            held.append(weakref.ref(tensor))
            yield str(index), tensor
            del tensor

    open_publisher(WeightsConfig(), None, None).push(weights(), version=1)
    assert len(held) == 4


def test_an_engine_that_does_not_join_is_an_error_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(EngineError, match="engine 0 does not join"):
        open_publisher(WeightsConfig(), INVENTORY, Keepers(Keeper("engine 0", joins=False)))
    assert time.monotonic() - started < 5


def test_a_push_that_fails_does_not_count() -> None:
    class Full(Keeper):
        async def begin_transfer(self) -> None:
            raise EngineError(f"{self.name} is full")

    publisher = open_publisher(WeightsConfig(), INVENTORY, Keepers(Full("engine 0")))
    with pytest.raises(EngineError, match="engine 0 is full"):
        publisher.push(WEIGHTS.items(), version=1)


@pytest.mark.parametrize(
    ("tells", "message"),
    [(True, "engine 0 does not take w1"), (False, "sending w1 and what follows it: ")],
    ids=["the engine tells", "the engine is silent"],
)
def test_a_bucket_that_an_engine_does_not_take_ends_the_push(tells: bool, message: str) -> None:
    """The transport only knows that time is up; the engine's own account has the end of its log."""

    class Late(Keeper):
        async def receive(self, info: dict[str, Any]) -> None:
            await asyncio.sleep(1.5 if tells else 3600)
            raise EngineError(f"{self.name} does not take {info['names'][0]}")

    config = WeightsConfig(push_seconds=1.0)
    started = time.monotonic()
    with pytest.raises(EngineError, match=message):
        open_publisher(config, INVENTORY, Keepers(Late("engine 0"))).push(WEIGHTS.items(), version=1)
    assert time.monotonic() - started < 9
