"""The process group through which buckets travel, of the leader (rank 0) and all workers of all engines: over gloo from
host memory to host memory, or over NCCL from GPU to GPU.

It has a store of its own and has nothing to do with torch.distributed's default group.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda import nccl
from torch.distributed import distributed_c10d as c10d

from dapo_megatron.routes import find_route
from dapo_megatron.weights.buckets import HOST

_POLL_SECONDS = 0.0005
_LOOK_SECONDS = 1.0
_OVER = "over"
_PRESENT = "present"
_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_SPARE_SECONDS = 1.0
"""For the event loop to notice first that time is up."""
_NEVER = timedelta(days=30)
"""Limit of NCCL's own watchdog: `Group` has the one that counts."""


class Group:
    """Rank 0 sends, the others receive.

    Args:
        processes: torch's process group.
        device: where what travels lies, on this rank.
        timeout_seconds: limit on a transmission.
        store: where rank 0 says that it leaves. Neither library tells members who wait for it: gloo not those in the
            midst of a message, NCCL nobody on another machine.
        world_size: how many members there are.

    Raises:
        RuntimeError: from `wait` and `sent`, where a transmission fails, takes too long, or rank 0 has left.
    """

    def __init__(
        self, processes: Any, device: torch.device, timeout_seconds: float, store: Any = None, world_size: int = 1
    ) -> None:
        self._processes: Any = processes
        self.device, self._timeout, self._store = device, timeout_seconds, store
        self._others, self._wanted = world_size - 1, 0
        self._left = self._late = False

    def be_present(self) -> None:
        """Say that this member receives now, whatever rank 0 does."""
        if self.device != HOST:
            self._store.add(_PRESENT, 1)

    async def all_present(self) -> None:
        """On rank 0, return once every member has said so once more.

        Otherwise NCCL's kernel would wait on the GPU for members that have not heard of the bucket, and where anything
        else that this process does waits for that GPU, they never will: with CUDA_DEVICE_MAX_CONNECTIONS=1 every kernel
        waits behind it, and without, one that is loaded for its first call or memory that is given back may.

        Raises:
            RuntimeError: where they have not within the time-out.
        """
        if self.device == HOST:
            return
        self._wanted += self._others
        deadline = time.monotonic() + self._timeout
        while (missing := self._wanted - self._store.add(_PRESENT, 0)) > 0:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{missing} of {self._others} workers have not come to a bucket within {self._timeout:g} s "
                    f"(weights.push_seconds)"
                )
            await asyncio.sleep(_POLL_SECONDS)

    def transmit(self, flat: Tensor) -> c10d.Work:
        """Start sending or receiving; all members make the same calls.

        Args:
            flat: contiguous, on `device`. It must stay as it is until the transmission is over.
        """
        options = c10d.BroadcastOptions()
        options.rootRank = 0
        return self._processes.broadcast([flat], options)

    def wait(self, works: list[c10d.Work]) -> None:
        """Block until transmissions are over, which are taken out of the list."""
        began = looked = time.monotonic()
        while works:
            while not works[0].is_completed() and (now := time.monotonic()) < began + self._timeout:
                if now - looked > _LOOK_SECONDS:
                    looked = now
                    self._look(works)
                time.sleep(_POLL_SECONDS)
            self._end(works)

    async def sent(self, works: list[c10d.Work]) -> None:
        """As `wait`. Blocking would keep an engine's error from being heard."""
        deadline = time.monotonic() + self._timeout
        with self._limit():
            while not all(work.is_completed() for work in works) and time.monotonic() < deadline:
                await asyncio.sleep(_POLL_SECONDS)
            while works:
                self._end(works)

    @contextmanager
    def _limit(self) -> Iterator[None]:
        """Leave the group in time, also where this thread waits for the GPU, and that for a member that is gone."""

        def end() -> None:
            self._late = True
            self.abandon()

        limit = threading.Timer(self._timeout + _SPARE_SECONDS, end)
        limit.daemon = True
        if self.device != HOST:
            limit.start()
        try:
            yield
        finally:
            limit.cancel()

    def abandon(self) -> None:
        """Leave the group without the others, for whom it is broken then."""
        if self._left:
            return
        self._left = True
        if self._store:
            with suppress(RuntimeError):  # rank 0, where the store is, may be gone
                self._store.set(_OVER, "")
        if self.device != HOST:  # kernels, which wait for the others, end
            self._processes.abort()
            return
        # Connections end with the last who holds them. Where somebody hangs at the other end, that takes a while.
        held, self._processes = [self._processes], None
        threading.Thread(target=held.clear, daemon=True).start()

    def _look(self, works: list[c10d.Work]) -> None:
        try:
            over = self._store is not None and self._store.check([_OVER])
        except RuntimeError:
            over = True
        if over:
            self._give_up(works, "the push was broken off elsewhere")

    def _end(self, works: list[c10d.Work]) -> None:
        """Take the first one out of the list."""
        if failure := self._failure(works[0]):
            self._give_up(works, failure)
        del works[0]

    def _failure(self, work: c10d.Work) -> str | None:
        library = "gloo" if self.device == HOST else "NCCL"
        if self._late or not work.is_completed():
            return f"{library} has not moved a bucket within {self._timeout:g} s (weights.push_seconds)"
        try:
            # NCCL's wait need not tell; gloo's does.
            if self.device != HOST and (error := work.exception()):
                return f"{library}: {error}"
            work.wait()  # whatever this process computes next comes after it
        except RuntimeError as error:
            return f"{library}: {error}"
        return None

    def _give_up(self, works: list[c10d.Work], reason: str) -> NoReturn:
        works.clear()  # they hold connections
        self.abandon()
        raise RuntimeError(reason)


def join_group(
    host: str,
    port: int,
    rank: int,
    world_size: int,
    timeout_seconds: float,
    listener: int | None = None,
    device: torch.device = HOST,
) -> Group:
    """The transfer group, once all `world_size` members are in it.

    Args:
        listener: a listening socket's descriptor, which rank 0 brings.
        device: of this member: on the host, the group is one of gloo, otherwise of NCCL.

    Raises:
        RuntimeError: where not all come within the time-out, or they have different versions of NCCL.
    """
    timeout = timedelta(seconds=timeout_seconds)
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        host, port, is_master=rank == 0, wait_for_workers=False, timeout=timeout, master_listen_fd=listener
    )
    if device == HOST:
        processes = _over_gloo(store, host, rank, world_size, timeout)
        return Group(processes, device, timeout_seconds, store, world_size)
    _compare_versions(store, rank)
    # Whoever makes the communicator waits for the others without a limit.
    store.set(f"member {rank}", "here")
    store.wait([f"member {other}" for other in range(world_size)], timeout)
    group = Group(_over_nccl(store, rank, world_size), device, timeout_seconds, store, world_size)
    # NCCL connects when it is first used.
    group.wait([group.transmit(torch.zeros(1, dtype=torch.uint8, device=device))])
    return group


def _over_gloo(store: Any, host: str, rank: int, world_size: int, timeout: timedelta) -> Any:
    options = c10d.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    # By default gloo resolves the machine's own name, which many containers and laptops cannot. On its way to the
    # leader, a member has an address that the others reach, too.
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=find_route(host).local)]
    options._timeout = timeout
    return c10d.ProcessGroupGloo(c10d.PrefixStore("weights", store), rank, world_size, options)


def let_us_end_transmissions(environment: MutableMapping[str, str]) -> None:
    """Have a process whose default group is one of NCCL survive an error of another group, such as this one.

    To be called before the default group is made. By torch's sources, every group's watchdog tells that one's to write
    a dump when it sees an error, whoever handles the error, and that ends the process some minutes later. A value that
    is there is kept.
    """
    environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")


def _over_nccl(store: Any, rank: int, world_size: int) -> Any:
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = _NEVER  # pyright: ignore[reportAttributeAccessIssue]
    with _errors_are_ours():
        return c10d.ProcessGroupNCCL(c10d.PrefixStore("weights", store), rank, world_size, options)


@contextmanager
def _errors_are_ours() -> Iterator[None]:
    """Have a group of NCCL that is made inside leave it to us what becomes of an error. Otherwise its watchdog ends
    this process where a member is gone; but an engine that fails is started again.
    """
    before = os.environ.get(_ERROR_HANDLING)
    os.environ[_ERROR_HANDLING] = "0"
    try:
        yield
    finally:
        del os.environ[_ERROR_HANDLING]
        if before is not None:
            os.environ[_ERROR_HANDLING] = before


def _compare_versions(store: Any, rank: int) -> None:
    """Refuse members with another NCCL than rank 0's, which may wait for each other in vain."""
    own = ".".join(map(str, nccl.version()))
    if rank == 0:
        store.set("nccl", own)
    elif (leaders := store.get("nccl").decode()) != own:
        raise RuntimeError(
            f"NCCL {own} here, and NCCL {leaders} in the trainer: both need the same; install the same torch on both "
            f"sides, or set weights.transport=gloo"
        )
