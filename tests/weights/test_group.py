"""What a group of NCCL does besides NCCL: when it waits, gives up, and whom it lets in. Torch's part is played."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore
from torch.cuda import nccl as nccl_module

from dapo_megatron.errors import EngineError
from dapo_megatron.weights import broadcast, group
from dapo_megatron.weights.broadcast import BroadcastPublisher
from dapo_megatron.weights.buckets import HOST, describe
from dapo_megatron.weights.group import Group, join_group
from dapo_megatron.weights.outgoing import Bucket
from dapo_megatron.weights.verify import Inventory
from tests.helpers.stand_in import OneEngine, StandIn

GPU = torch.device("cuda", 0)


class Work:
    def __init__(self, *, ends: bool = True, error: str = "") -> None:
        self._ends, self._error = ends, error
        self.waited = 0

    def is_completed(self) -> bool:
        return self._ends or bool(self._error)

    def exception(self) -> Exception | None:
        return RuntimeError(self._error) if self._error else None

    def wait(self) -> None:
        assert self.is_completed(), "torch would wait with a limit of its own"
        self.waited += 1


class Processes:
    """Torch's process group."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.aborted = 0

    def broadcast(self, tensors: list[Any], options: Any) -> Work:
        assert options.rootRank == 0 and options.asyncOp  # otherwise torch gives nothing to wait for
        self.sent += tensors
        return Work()

    def abort(self) -> None:
        self.aborted += 1


def finish(kind: str, nccl: Group, works: list[Any]) -> None:
    if kind == "wait":
        nccl.wait(works)
    else:
        asyncio.run(nccl.sent(works))


@pytest.mark.parametrize("kind", ["wait", "sent"])
def test_what_this_process_computes_next_comes_after_the_bucket(kind: str) -> None:
    works, processes = [Work(), Work()], Processes()
    finish(kind, Group(processes, GPU, 1.0), [*works])
    assert [work.waited for work in works] == [1, 1] and not processes.aborted


@pytest.mark.parametrize("kind", ["wait", "sent"])
@pytest.mark.parametrize(
    ("work", "says"),
    [
        (Work(ends=False), r"NCCL has not moved a bucket within 0.2 s \(weights.push_seconds\)"),
        (Work(error="remote process exited"), "NCCL: remote process exited"),
    ],
    ids=["hangs", "fails"],
)
def test_a_transmission_that_does_not_end_is_aborted(kind: str, work: Work, says: str) -> None:
    processes, began = Processes(), time.monotonic()
    with pytest.raises(RuntimeError, match=says):
        finish(kind, Group(processes, GPU, 0.2), [work])
    assert processes.aborted == 1 and time.monotonic() - began < 2


def test_a_transmission_is_aborted_also_where_this_thread_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "_SPARE_SECONDS", 0.1)
    processes = Processes()
    stuck: Any = Work(ends=False)

    async def push() -> None:
        sending = asyncio.ensure_future(Group(processes, GPU, 0.2).sent([stuck]))
        await asyncio.sleep(0.05)
        began = time.monotonic()
        while not processes.aborted and time.monotonic() < began + 5:
            time.sleep(0.01)  # the event loop stands still
        await sending

    with pytest.raises(RuntimeError, match=r"NCCL has not moved a bucket within 0.2 s \(weights.push_seconds\)"):
        asyncio.run(push())
    assert processes.aborted == 1


def test_rank_0_sends_nothing_over_nccl_before_all_have_heard_of_it() -> None:
    store, processes = HashStore(), Processes()
    carrier = broadcast._Broadcast("127.0.0.1", GPU, 0.5)
    carrier.group = Group(processes, GPU, 0.5, store, world_size=3)
    members = [Group(Processes(), GPU, 0.5, store, world_size=3) for _ in range(2)]
    flat: Any = "bytes"

    async def push() -> None:
        for bucket in range(2):
            carrying = asyncio.ensure_future(carrier.carry(Bucket([0], None, {}, [flat])))
            for member in members:
                await asyncio.sleep(0.05)
                assert len(processes.sent) == bucket
                member.be_present()
            await carrying
            assert len(processes.sent) == bucket + 1
        members[0].be_present()
        await carrier.carry(Bucket([0], None, {}, [flat]))

    with pytest.raises(RuntimeError, match=r"^1 of 2 workers have not come to a bucket within 0.5 s \(weights.push_s"):
        asyncio.run(push())
    assert len(processes.sent) == 2 and processes.aborted == 1


def test_gloo_waits_for_nobody_as_it_sends_in_a_thread() -> None:
    asyncio.run(Group(Processes(), HOST, 0.5, None, world_size=3).all_present())


class Store(dict[str, bytes]):
    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def wait(self, keys: list[str], limit: Any) -> None:
        """Those of other members are there as well."""
        assert keys[0] == "member 0" and self.keys() & {*keys}, "a member says that it is here before it waits"
        self["waited"] = f"{len(keys)} members, {limit.total_seconds():g} s".encode()


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Torch with NCCL; what its group is made with."""
    made: dict[str, Any] = {"store": Store(), "version": (2, 28, 9)}

    class Options:
        _timeout: Any = None

    class Nccl(Processes):
        def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
            super().__init__()
            assert b"members" in store["waited"], "whoever makes a group waits for all without a limit"
            handling = os.environ.get(group._ERROR_HANDLING)
            made.update(processes=self, rank=rank, size=size, timeout=options._timeout, handling=handling)

    Nccl.Options = Options  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(group.dist, "TCPStore", lambda *_, **__: made["store"])
    monkeypatch.setattr(group.c10d, "PrefixStore", lambda prefix, store: store)
    monkeypatch.setattr(group.c10d, "ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.setattr(nccl_module, "version", lambda: made["version"])
    monkeypatch.setattr(torch, "zeros", lambda *_, **more: more["device"])
    return made


@pytest.mark.parametrize("before", [None, "3"])
def test_members_meet_when_they_join_and_errors_are_left_to_us(
    nccl: dict[str, Any], before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before:
        monkeypatch.setenv(group._ERROR_HANDLING, before)
    else:
        monkeypatch.delenv(group._ERROR_HANDLING, raising=False)
    joined = join_group("127.0.0.1", 1, 0, 3, 7.0, None, GPU)
    assert (joined.device, nccl["rank"], nccl["size"]) == (GPU, 0, 3)
    assert nccl["timeout"] == group._NEVER  # whoever waits has the limit, not the watchdog
    assert nccl["store"]["waited"] == b"3 members, 7 s"
    assert nccl["processes"].sent == [GPU]  # the first transmission connects them
    assert nccl["handling"] == "0" and os.environ.get(group._ERROR_HANDLING) == before


def test_a_member_with_another_nccl_is_refused(nccl: dict[str, Any]) -> None:
    join_group("127.0.0.1", 1, 0, 3, 7.0, None, GPU)
    join_group("127.0.0.1", 1, 1, 3, 7.0, None, GPU)
    nccl["version"] = (2, 27, 5)
    with pytest.raises(RuntimeError, match=r"NCCL 2.27.5 here, and NCCL 2.28.9 in the trainer.*transport=gloo"):
        join_group("127.0.0.1", 1, 2, 3, 7.0, None, GPU)


class Dying(StandIn):
    """Is killed when a bucket is announced to it."""

    async def receive(self, info: dict[str, Any]) -> None:
        self._process.kill()
        await super().receive(info)


class Both(OneEngine):
    def __init__(self, *engines: StandIn) -> None:
        super().__init__(engines[0])
        self._engines = engines

    def __iter__(self) -> Iterator[StandIn]:
        return iter(self._engines)


@pytest.mark.multiproc
@pytest.mark.parametrize("dies", [0, 1])
def test_an_engine_that_is_gone_does_not_keep_the_others_waiting_for_the_limit(dies: int) -> None:
    engines = [Dying() if index == dies else StandIn() for index in range(2)]
    weights = {f"layers.{index}.weight": torch.zeros(4 << 20) for index in range(8)}
    inventory = Inventory(**describe(list(weights.items())))
    with ExitStack() as stack:
        for engine in engines:
            stack.enter_context(closing(engine))
        publisher = BroadcastPublisher(inventory, Both(*engines), 256 << 20, timeout_seconds=40)
        stack.enter_context(closing(publisher))
        began = time.monotonic()
        with pytest.raises((EngineError, EOFError, OSError)):
            publisher.push(weights.items(), version=1)
        with pytest.raises(EngineError, match=r"gloo: .*closed by peer|the push was broken off elsewhere"):
            engines[1 - dies].done()
        assert time.monotonic() - began < 20
