"""Writes and reads sharded state in Megatron's format `torch_dist`, on the parts of its `dist_checkpointing`.

Saving has two halves. `ShardSaver` plans with the other ranks and copies to host memory; what it returns is written
to files without another collective, in a thread. Megatron's own asynchronous save forks a process for that, out of one
that has threads, streams and process groups.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

COMMON = "common.pt"


@dataclass(frozen=True)
class Shards:
    """This rank's part of a checkpoint, in host memory."""

    rank: int
    plan: SavePlan
    data: Mapping[MetadataIndex, Tensor | BytesIO]
    metadata: Metadata | None
    """On rank 0, what the files of all ranks will hold together."""
    common: dict[str, Any] | None
    """On rank 0, what is alike on all: plain values."""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.data.values() if isinstance(part, Tensor))

    def write(self, folder: Path) -> list[WriteResult]:
        """Write this rank's file, `__RANK_0.distcp`, where it has anything to write.

        Returns:
            What `finish` needs of every rank.

        Raises:
            OSError: where it cannot be written.
        """
        if not self.plan.items:
            return []
        results = _writer(folder).write_data(self.plan, _Copied(self.data)).wait()
        return list(results)

    def finish(self, folder: Path, results: Sequence[list[WriteResult]]) -> None:
        """On rank 0, once all ranks have written: make the folder a checkpoint of Megatron's.

        Raises:
            OSError: where it cannot be written.
        """
        assert self.metadata is not None
        torch.save(self.common, folder / COMMON)
        _writer(folder).finish(self.metadata, list(results))
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class ShardSaver:
    """Copies what ranks write of a sharded state, which keeps its form for the whole run.

    Args:
        replicas: ranks that hold the same weights, among which the writing is divided.
        host: all ranks, over gloo.
    """

    def __init__(self, replicas: dist.ProcessGroup, host: dist.ProcessGroup) -> None:
        self._host = host
        # Who writes what is agreed on once.
        self._divided = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy(), replicas, do_cache_distribution=True
        )
        self._validated = False

    def copy(self, state: dict[str, Any]) -> Shards:
        """Copy to host memory what this rank is to write of `state` (`actor.sharded.sharded_state`). Collective."""
        preprocess: Any = save_preprocess
        sharded, common = preprocess(state, validate_access_integrity=not self._validated)
        self._validated = True
        self._divided.apply_saving_parallelization(sharded)
        renamed, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded, True)
        rank = dist.get_rank()
        planner = torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(torch_dist.mcore_to_pyt_state_dict(renamed, False), is_coordinator=rank == 0)
        plan = planner.create_local_plan()
        plans: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
        dist.gather_object(plan, plans, dst=0, group=self._host)
        metadata = planner.create_global_plan(plans)[1] if plans else None
        # The file's name comes of a plan's place among all.
        plan = _writer(Path()).prepare_global_plan([plan] * (rank + 1))[rank]
        plan = planner.finish_plan(plan)
        data = {item.index: _to_host(planner.resolve_data(item)) for item in plan.items}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return Shards(rank, plan, data, metadata, common if rank == 0 else None)


def read_shards(
    state: dict[str, Any], folder: Path, replicas: dist.ProcessGroup, objects: Collection[str]
) -> dict[str, Any]:
    """Read what `state` (`actor.sharded.sharded_state` for loading) names, and what is common to all. Collective.

    Every part of a tensor is read by one of the ranks that want it, and comes to the others from there.

    Args:
        objects: the keys of those that the checkpoint has besides tensors (`convert.dist_files.check`, which is to be
            called before: they are unpickled). Others are left out.
    """
    _, state = extract_matching_values(  # pyright: ignore[reportAssignmentType]
        state, lambda part: isinstance(part, ShardedObject) and part.unique_key not in objects
    )
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(folder)), replicas)
    return dist_checkpointing.load(state, str(folder), sharded_strategy=strategy)  # pyright: ignore[reportReturnType]


class _Copied(torch_dist.MCoreSavePlanner):
    """Answers a writer with copies."""

    def __init__(self, data: Mapping[MetadataIndex, Tensor | BytesIO]) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._data = data

    def resolve_data(self, write_item: WriteItem) -> Tensor | BytesIO:
        return self._data[write_item.index]


def _writer(folder: Path) -> FileSystemWriter:
    # Nothing is copied ahead: the tensors are in host memory.
    return FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1, per_thread_copy_ahead=0)


def _to_host(tensor: Tensor | BytesIO) -> Tensor | BytesIO:
    if isinstance(tensor, BytesIO):
        return tensor
    if tensor.device.type == "cpu":
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor.detach(), non_blocking=True)
