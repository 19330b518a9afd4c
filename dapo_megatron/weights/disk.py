"""Weights through a folder that trainer and engines share."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from dapo_megatron.errors import StorageError
from dapo_megatron.measures import Max, Measures, Sum
from dapo_megatron.units import size
from dapo_megatron.weights.buckets import Named, grouped
from dapo_megatron.weights.checksum import checksums
from dapo_megatron.weights.gathering import Gathered, Gathering
from dapo_megatron.weights.publish import LeaderSays, Receivers, WeightReceiver, asked
from dapo_megatron.weights.verify import Inventory, Tally
from dapo_megatron.weights.version_folders import newest, remove_others, version_folder
from dapo_megatron.weights.versions import write_version


class DiskPublisher:
    """A `Publisher` that writes each version as a checkpoint, which engines then load. The last one stays.

    Args:
        inventory: what every push brings, on the leader.
        receivers: the engines, on the leader; None on other ranks.
        folder: of this run alone; all machines see it under this path.
        bucket_bytes: size of a file, except where one tensor is larger. The leader has one in memory, and a copy.
        side_files: writes what belongs to a checkpoint besides tensors, on the leader.
        leader_says: see `gathering`.
        with_checksums: whether engines get checksums to compare what they have read with.
    """

    def __init__(
        self,
        inventory: Inventory | None,
        receivers: Receivers | None,
        folder: Path,
        bucket_bytes: int,
        side_files: Callable[[Path], object] = lambda folder: None,
        leader_says: LeaderSays = lambda what, value: value,
        *,
        with_checksums: bool = True,
    ) -> None:
        self._receivers, self._folder, self._side_files = receivers, folder.absolute(), side_files
        self._gathering, self._with_checksums = Gathering(bucket_bytes, leader_says), with_checksums
        self._members: list[WeightReceiver] = []
        """The engines that know what a push brings."""
        self._in_use: Path | None = None
        """The version that the engines have loaded."""
        if inventory is not None:
            self._inventory, self._tally = inventory, Tally(inventory)

    def push(self, weights: Iterable[tuple[str, Tensor]] | None, version: int) -> Measures:
        if self._receivers is None:
            self._gathering.follow(weights)
            return {}
        assert weights is not None
        began = time.monotonic()
        written, sums, spent = self._write(weights, version)
        self._receivers.run(self._load(self._receivers, written, version, sums))
        self._in_use = written
        remove_others(self._folder, written)
        seconds, sent = time.monotonic() - began, sum(self._inventory.sizes)
        return {
            "verify/tensors": Sum(len(self._inventory.names)),
            "seconds/verify": Sum(spent),
            "push/seconds": Sum(seconds),
            "push/share": Max(1.0),
            "push/gb_per_second": Max(sent / seconds / 1e9),
        }

    def close(self) -> None:
        self._members = []

    def _write(self, weights: Iterable[tuple[str, Tensor]], version: int) -> tuple[Path, dict[str, int], float]:
        """Write a version. Returns its folder, checksums by name, if they are wanted, and the seconds that they took.

        Raises:
            TransferError: where the weights are not the model's.
            StorageError: where they cannot be written.
        """
        sums: dict[str, int] = {}
        spent = 0.0

        def shards(gathered: Gathered) -> Iterator[Named]:
            nonlocal spent
            self._tally.begin()
            for bucket in grouped(gathered):
                self._tally.count(self._tally.find(bucket))
                if self._with_checksums:
                    started = time.monotonic()
                    sums.update(zip((name for name, _ in bucket), checksums([x for _, x in bucket]), strict=True))
                    spent += time.monotonic() - started
                # Copies: safetensors refuses tensors that share memory.
                yield [(name, tensor.to("cpu", copy=True).contiguous()) for name, tensor in bucket]
            self._tally.end()

        with self._gathering.leading(weights) as passes:
            target = version_folder(self._folder, version)
            # Those of pushes that broke off, too: so never more than two are there.
            remove_others(self._folder, self._in_use or newest(self._folder))
            try:
                write_version(target, shards(passes.take()), self._side_files)
            except (OSError, SafetensorError) as error:
                raise StorageError(self._cannot_write(version, target, error)) from error
        return target, sums, spent

    def _cannot_write(self, version: int, target: Path, error: Exception) -> str:
        free = ""
        with suppress(OSError):  # the storage itself may be gone
            place = next(parent for parent in target.parents if parent.exists())
            free = f", and {size(shutil.disk_usage(place).free)} are free"
        return (
            f"cannot write the weights of version {version} to {target}: {error}. A version takes "
            f"{size(sum(self._inventory.sizes))}, two are there while engines load one{free}; no engine has loaded any "
            f"of it. Make room, or set weights.folder to another folder that all machines share"
        )

    async def _load(self, receivers: Receivers, written: Path, version: int, sums: dict[str, int]) -> None:
        engines = list(receivers)
        new = [engine for engine in engines if engine not in self._members]
        await _all(asked(engine, engine.join_group({"inventory": asdict(self._inventory)})) for engine in new)
        self._members = engines
        await _all(asked(engine, engine.begin_transfer()) for engine in engines)
        info: dict[str, Any] = {
            "folder": str(written),
            "checksums": [sums[name] for name in self._inventory.names] if self._with_checksums else None,
        }
        await _all(asked(engine, engine.receive(info)) for engine in engines)
        await _all(asked(engine, engine.finish_transfer(version)) for engine in engines)


async def _all(steps: Iterable[Awaitable[Any]]) -> Sequence[Any]:
    """Await all of `steps`, and raise the first failure then: an engine in the midst of reading hears of nothing."""
    tasks = [asyncio.ensure_future(step) for step in steps]
    try:
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        for task in tasks:
            task.cancel()
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers
