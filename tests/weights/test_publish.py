"""The publisher on the leader and on another rank, over a real gloo group to engines that only keep what they get."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, ClassVar

import pytest
import torch

from dapo_megatron.config import WeightsConfig
from dapo_megatron.errors import EngineError
from dapo_megatron.measures import Measures
from dapo_megatron.weights import broadcast
from dapo_megatron.weights.broadcast import BroadcastPublisher
from dapo_megatron.weights.buckets import Named, describe
from dapo_megatron.weights.group import Group, join_group
from dapo_megatron.weights.inbox import FromGroup
from dapo_megatron.weights.publish import open_publisher
from dapo_megatron.weights.verify import Arrivals, Inventory, TransferError

WEIGHTS = {f"w{index}": torch.full((index, 3), index, dtype=torch.bfloat16) for index in range(1, 6)}
INVENTORY = Inventory(**describe(list(WEIGHTS.items())))


class Keeper:
    """One worker that keeps the weights of every version."""

    workers, keeps = 1, True

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
        self.announced: list[dict[str, Any]] = []
        self.arrivals.begin()

    async def receive(self, info: dict[str, Any]) -> None:
        self.announced.append(info)
        with self.telling():
            if info["kept"]:
                self.arrivals.keep(info["tensors"], info["checksums"])
                self.coming |= {name: self.held[max(self.held)][name] for name in info["names"]}
                return
            flat = self.arrivals.allocate(info["tensors"])
            await asyncio.to_thread(FromGroup(self.group).fetch(flat, self.arrivals.sizes(info["tensors"]), {}))
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
    publisher = BroadcastPublisher(INVENTORY, keepers, bucket_bytes=64, timeout_seconds=20)
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


def test_a_bucket_that_is_made_wrongly_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(tensor: torch.Tensor, flat: torch.Tensor, start: int) -> None:
        put(tensor, flat, start)
        flat[start] ^= 1

    put = broadcast.put
    monkeypatch.setattr(broadcast, "put", elsewhere)
    with pytest.raises(EngineError, match=r"engine \d, w1, w2, w3 and 2 more has arrived with other bytes"):
        push(Keeper("engine 1"), WEIGHTS.items())


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
        closing(BroadcastPublisher(INVENTORY, Keepers(Frugal("engine 1")), 32, timeout_seconds=5)) as publisher,
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
    with closing(BroadcastPublisher(INVENTORY, Keepers(lazy), 64, timeout_seconds=5)) as publisher:
        measures = publisher.push(WEIGHTS.items(), version=1)
        assert measures["verify/tensors"].value == 5 and measures["seconds/verify"].value > 0
        with pytest.raises(
            EngineError, match="engine 0, w1, w2, w3 and 2 more: the engine has loaded the push, and has"
        ):
            publisher.push(((name, -tensor) for name, tensor in WEIGHTS.items()), version=2)


class TestDelta:
    """Layers of two tensors each, and one that is larger than a bucket."""

    weights: ClassVar = {
        "embed.weight": torch.zeros(4),
        **{f"layers.{layer}.{name}.weight": torch.zeros(8) for layer in range(3) for name in ("a", "b")},
        **{f"layers.3.{name}.weight": torch.zeros(24) for name in "abc"},
    }
    inventory = Inventory(**describe(list(weights.items())))

    @pytest.fixture
    def keeper(self) -> Keeper:
        return Keeper("engine 0")

    @pytest.fixture
    def publisher(self, keeper: Keeper, request: pytest.FixtureRequest) -> Iterator[BroadcastPublisher]:
        arguments: dict[str, Any] = getattr(request, "param", {})
        with closing(
            BroadcastPublisher(self.inventory, Keepers(keeper), 128, timeout_seconds=20, **arguments)
        ) as publisher:
            yield publisher

    def sent(self, keeper: Keeper, *, kept: bool = False) -> list[str]:
        return sorted(name for info in keeper.announced if info["kept"] == kept for name in info["names"])

    def push(self, publisher: BroadcastPublisher, keeper: Keeper, version: int, **changed: float) -> Measures:
        weights = {name: tensor.clone() for name, tensor in self.weights.items()}
        for name, value in changed.items():
            weights[name.replace("_", ".") + ".weight"][0] = value
        measures = publisher.push(weights.items(), version)
        assert all(torch.equal(keeper.held[version][name], tensor) for name, tensor in weights.items())
        assert sorted(self.sent(keeper) + self.sent(keeper, kept=True)) == sorted(weights)
        return measures

    @pytest.mark.parametrize("publisher", [{}, {"with_checksums": False}], indirect=True)
    def test_layers_that_have_not_changed_are_left_out(self, publisher: BroadcastPublisher, keeper: Keeper) -> None:
        assert self.push(publisher, keeper, 1)["push/share"].value == 1
        measures = self.push(publisher, keeper, 2)
        assert self.sent(keeper) == [] and measures["push/share"].value == 0 and measures["verify/tensors"].value == 10
        measures = self.push(publisher, keeper, 3, layers_1_b=2.0)
        assert self.sent(keeper) == ["layers.1.a.weight", "layers.1.b.weight"]
        assert measures["push/share"].value == 64 / (16 + 6 * 32 + 3 * 96)
        self.push(publisher, keeper, 4, embed=1.0)
        assert self.sent(keeper) == ["embed.weight", "layers.1.a.weight", "layers.1.b.weight"]

    def test_a_large_layer_that_changes_at_its_end_is_gathered_again(
        self, publisher: BroadcastPublisher, keeper: Keeper
    ) -> None:
        self.push(publisher, keeper, 1)
        self.push(publisher, keeper, 2, layers_3_c=2.0)
        assert self.sent(keeper) == ["layers.3.a.weight", "layers.3.b.weight", "layers.3.c.weight"]

    @pytest.mark.parametrize("publisher", [{"delta": False}], indirect=True)
    def test_without_it_everything_is_sent(self, publisher: BroadcastPublisher, keeper: Keeper) -> None:
        assert [self.push(publisher, keeper, version)["push/share"].value for version in (1, 2)] == [1, 1]

    def test_an_engine_that_cannot_keep_gets_everything(self, publisher: BroadcastPublisher, keeper: Keeper) -> None:
        keeper.keeps = False
        with closing(BroadcastPublisher(self.inventory, Keepers(keeper), 128, timeout_seconds=20)) as publisher:
            assert [self.push(publisher, keeper, version)["push/share"].value for version in (1, 2)] == [1, 1]

    def test_an_engine_that_was_started_again_gets_everything(self) -> None:
        keepers = Keepers(Keeper("engine 0"), Keeper("engine 1"))
        with closing(BroadcastPublisher(self.inventory, keepers, 128, timeout_seconds=20)) as publisher:
            self.push(publisher, keepers.keepers[0], 1)
            keepers.keepers = (keepers.keepers[0], Keeper("engine 1"))
            for version, share in ((2, 1), (3, 0)):
                assert self.push(publisher, keepers.keepers[1], version)["push/share"].value == share

    def test_after_a_push_that_broke_off_everything_is_sent(
        self, publisher: BroadcastPublisher, keeper: Keeper
    ) -> None:
        self.push(publisher, keeper, 1)
        with pytest.raises(EngineError, match="left out"):
            publisher.push([*self.weights.items()][1:], version=2)
        assert self.push(publisher, keeper, 3)["push/share"].value == 1

    def test_an_engine_with_other_weights_than_it_is_to_keep_is_caught(
        self, publisher: BroadcastPublisher, keeper: Keeper
    ) -> None:
        self.push(publisher, keeper, 1)
        keeper.arrivals = Arrivals(asdict(self.inventory))
        says = "engine 0, embed.weight, .* and 7 more: left out as unchanged, but the last push brought other"
        with pytest.raises(EngineError, match=says):
            publisher.push(self.weights.items(), version=2)

    def test_other_ranks_gather_as_often_as_the_leader(self, keeper: Keeper) -> None:
        said: list[Any] = []

        def says(what: str, value: Any) -> Any:
            said.append(value)
            return value

        with closing(BroadcastPublisher(self.inventory, Keepers(keeper), 128, says, timeout_seconds=20)) as leader:
            self.push(leader, keeper, 1)
            first = len(said)
            self.push(leader, keeper, 2, layers_3_c=2.0)
        assert said[first - 1] == said[-1] == "end" and said[first:].count("again") == 1
        for takes_part in (True, False):
            passes = []

            class Weights:
                def __iter__(self, passes: list[int] = passes) -> Iterator[tuple[str, torch.Tensor]]:
                    passes.append(1)
                    return iter(TestDelta.weights.items())

            words = iter(said[first:])
            other = BroadcastPublisher(
                None, None, 128, lambda what, value, words=words: next(words), timeout_seconds=20
            )
            other.push(Weights() if takes_part else None, version=2)
            assert list(words) == [] and len(passes) == (2 if takes_part else 0)


def test_a_bucket_is_made_while_the_one_before_is_on_its_way() -> None:
    happened: list[str] = []

    class Slow(Keeper):
        async def receive(self, info: dict[str, Any]) -> None:
            happened.append(f"begin {info['names'][0]}")
            await super().receive(info)
            await asyncio.sleep(0.2)
            happened.append(f"end {info['names'][0]}")

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in WEIGHTS.items():
            happened.append(name)
            yield name, tensor

    with closing(BroadcastPublisher(INVENTORY, Keepers(Slow("engine 0")), 32, timeout_seconds=20)) as publisher:
        publisher.push(weights(), version=1)
    order = happened.index
    # Buckets are w1 with w2, w3, w4, w5. The first tensor of one tells that the one before is full.
    assert order("w4") < order("end w1") < order("w5") < order("end w3")
    assert order("end w1") < order("begin w3")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Group, int]]:
    """Which memory is transmitted, and by which member of a group, the receivers among them."""
    found: list[tuple[Group, int]] = []

    def noting(group: Group, flat: torch.Tensor) -> Any:
        found.append((group, flat.data_ptr()))
        return transmit(group, flat)

    transmit = Group.transmit
    monkeypatch.setattr(Group, "transmit", noting)
    return found


def test_the_sender_has_two_buckets(sent: list[tuple[Group, int]]) -> None:
    keepers = Keepers(keeper := Keeper("engine 0"))
    with closing(BroadcastPublisher(INVENTORY, keepers, 32, timeout_seconds=20, delta=False)) as publisher:
        for version in (1, 2):
            publisher.push(WEIGHTS.items(), version)
    flats = [pointer for group, pointer in sent if group is not keeper.group]
    assert len(flats) == 8 and len(set(flats)) == 2


def test_large_tensors_are_sent_from_where_they_are(sent: list[tuple[Group, int]]) -> None:
    weights = {
        "small": torch.ones(5),
        "large": torch.arange(1 << 18, dtype=torch.float32),
        "turned": torch.arange(1 << 18, dtype=torch.float32).view(512, 512).T,
        "last": torch.ones(3, 2),
    }
    keepers, inventory = Keepers(keeper := Keeper("engine 0")), Inventory(**describe(list(weights.items())))
    with closing(BroadcastPublisher(inventory, keepers, 4 << 20, timeout_seconds=20)) as publisher:
        publisher.push(weights.items(), 1)
    assert all(torch.equal(keeper.held[1][name], tensor) for name, tensor in weights.items())
    flats = [pointer for group, pointer in sent if group is not keeper.group]
    where = [name for pointer in flats for name, tensor in weights.items() if tensor.data_ptr() == pointer]
    # The one that is not contiguous is a piece of its own, too, but of a room.
    assert len(flats) == 4 and where == ["large"]


def test_all_ranks_wait_for_the_leader_before_they_gather_the_same_weights() -> None:
    seen: dict[str, list[str]] = {}
    for rank, receivers in (("leader", Keepers(Keeper("engine 0"))), ("other", None)):
        happened = seen[rank] = []

        def weights(happened: list[str] = happened) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in WEIGHTS.items():
                happened.append(name)
                yield name, tensor

        def says(what: str, value: Any, happened: list[str] = happened) -> Any:
            happened.append(what)
            return "end"

        publisher = BroadcastPublisher(INVENTORY, receivers, 64, says, timeout_seconds=20)
        publisher.push(weights(), version=1)
        publisher.close()
    together = ["weights", "w1", "w2", "w3", "w4", "weights", "w5", "weights"]
    assert seen["leader"] == seen["other"] == together


def test_another_rank_holds_one_tensor_at_a_time() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(4):
            assert all(tensor() is None for tensor in held[:-1])
            tensor = torch.zeros(100)
            held.append(weakref.ref(tensor))
            yield str(index), tensor
            del tensor

    open_publisher(WeightsConfig(), None, None, lambda what, value: "end").push(weights(), version=1)
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


def test_where_no_engine_is_left_after_a_push_that_broke_off_the_next_one_goes_to_none() -> None:
    class Fails(Keeper):
        async def receive(self, info: dict[str, Any]) -> None:
            raise EngineError(f"{self.name} has no room")

    there = Keepers(Fails("engine 0"))
    with closing(BroadcastPublisher(INVENTORY, there, bucket_bytes=64, timeout_seconds=2)) as publisher:
        with pytest.raises(EngineError, match="engine 0 has no room"):
            publisher.push(WEIGHTS.items(), version=1)
        there.keepers = ()
        publisher.push(WEIGHTS.items(), version=1)
        there.keepers = (again := Keeper("engine 0"),)
        publisher.push(WEIGHTS.items(), version=1)
    assert again.held[1].keys() == WEIGHTS.keys()


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
