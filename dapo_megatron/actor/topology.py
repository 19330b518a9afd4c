"""Who is where: the ranks of a run and their groups.

Ranks count tensor parallel fastest, then context, data, and pipeline parallel (Megatron's own order):
rank = tp_rank + tp x (cp_rank + cp x (dp_rank + dp x pp_rank)).
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from dapo_megatron.config import ParallelConfig

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

T = TypeVar("T")

TIMEOUT = timedelta(hours=4)
"""How long a rank waits for the others. The leader samples while the rest waits, which may take an hour."""

_LOOPBACK = "lo"


@dataclass(frozen=True, slots=True)
class _HostGroups:
    """Groups for what lies in host memory, over gloo."""

    world: dist.ProcessGroup
    replica: dist.ProcessGroup
    """The ranks of this data-parallel replica."""
    speakers: Any
    """The first rank of every replica; no group on other ranks."""


_host: _HostGroups | None = None


@dataclass(frozen=True, slots=True)
class Topology:
    """Where this process stands.

    >>> Topology(rank=3, world_size=4, tp=2, pp=1, cp=1, dp=2, tp_rank=1, pp_rank=0, cp_rank=0, dp_rank=1)
    Topology(rank=3, world_size=4, tp=2, pp=1, cp=1, dp=2, tp_rank=1, pp_rank=0, cp_rank=0, dp_rank=1)
    """

    rank: int
    world_size: int
    tp: int
    pp: int
    cp: int
    dp: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int

    @property
    def is_leader(self) -> bool:
        """The one rank that talks to engines and writes files."""
        return self.rank == 0

    @property
    def speaks_for_replica(self) -> bool:
        """The one rank of each data-parallel replica that counts where all of them hold the same."""
        return self.tp_rank == self.pp_rank == self.cp_rank == 0

    @property
    def device(self) -> torch.device:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


def initialize(parallel: ParallelConfig, *, seed: int = 0, timeout: timedelta = TIMEOUT) -> Topology:
    """Join the process group and split it. Reads torchrun's environment; without it, this is a run of one process.

    Args:
        seed: of torch and of Megatron's random states.
        timeout: of every collective, those that wait for the leader's rollout included.

    Raises:
        ConfigError: where tp x pp x cp does not divide the number of ranks.
    """
    global _host
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    dp = parallel.data_parallel(world_size)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl"
    else:
        from dapo_megatron.actor import cpu

        cpu.enable()
        backend = "gloo"
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size) and _LOOPBACK in dict(socket.if_nameindex()).values():
        # Ranks of one machine have no business on its network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        distributed_timeout_minutes=max(1, int(timeout.total_seconds() // 60)),
    )
    block = parallel.tp * parallel.cp
    members = [[rank for rank in range(world_size) if rank // block % dp == replica] for replica in range(dp)]
    world, speakers, *replicas = (
        dist.new_group(ranks, backend="gloo", timeout=timeout)
        for ranks in (None, [first for first, *_ in members], *members)
    )
    _host = _HostGroups(cast(dist.ProcessGroup, world), cast(Any, replicas[rank // block % dp]), speakers)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return Topology(
        rank=rank,
        world_size=world_size,
        tp=parallel.tp,
        pp=parallel.pp,
        cp=parallel.cp,
        dp=dp,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        cp_rank=mpu.get_context_parallel_rank(),
        dp_rank=mpu.get_data_parallel_rank(),
    )


def shutdown() -> None:
    """Leave the process group. Does nothing where there is none."""
    global _host
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state as mpu

    mpu.destroy_model_parallel()
    dist.destroy_process_group()
    _host = None


def process_groups() -> ProcessGroupCollection:
    """Megatron's groups of this rank, to be handed on by name rather than looked up wherever they are used."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()


class Replicas:
    """Sums and maxima over the data-parallel replicas of what all ranks of a replica hold alike. Collective."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def sum(self, values: Tensor) -> Tensor:
        """A new tensor, on the host: the sum of `values` (host, same shape on all ranks), each replica counted once."""
        return self._reduce(values, dist.ReduceOp.SUM, 0)

    def max(self, values: Tensor) -> Tensor:
        """Likewise the largest. Floating only; nan counts as inf, which no backend drops on the way."""
        return self._reduce(torch.where(values.isnan(), torch.inf, values), dist.ReduceOp.MAX, -torch.inf)

    def _reduce(self, values: Tensor, operation: Any, neutral: float) -> Tensor:
        own = values.clone() if self._topology.speaks_for_replica else torch.full_like(values, neutral)
        assert _host, "initialize comes first"
        dist.all_reduce(own, op=operation, group=_host.world)
        return own


def scatter(per_dp: list[T] | None, topology: Topology) -> T:
    """Give every rank the entry of its data-parallel replica. Collective; the others wait here for the leader.

    Args:
        per_dp: on the leader, one entry per data-parallel rank; None elsewhere. Entries are pickled: a tensor that is
            a view of a larger one carries all of it along.
    """
    assert _host, "initialize comes first"
    if topology.is_leader and (per_dp is None or len(per_dp) != topology.dp):
        given = "nothing" if per_dp is None else f"{len(per_dp)} entries"
        raise ValueError(f"scatter wants one entry per data-parallel rank: {topology.dp}, got {given}")
    received: list[Any] = [None]
    # To one rank of each replica, which hands it on: the leader would need memory for a copy per rank.
    if topology.speaks_for_replica:
        dist.scatter_object_list(received, per_dp, src=0, group=_host.speakers)
    dist.broadcast_object_list(received, group_src=0, group=_host.replica)
    return received[0]


def gather(value: T, topology: Topology) -> list[T] | None:
    """The opposite of `scatter`: on the leader the value of every data-parallel replica, elsewhere None. Collective."""
    assert _host, "initialize comes first"
    entries: list[Any] | None = [None] * topology.dp if topology.is_leader else None
    if topology.speaks_for_replica:
        dist.gather_object(value, entries, dst=0, group=_host.speakers)
    return entries


def broadcast(value: T | None) -> T:
    """Give every rank the leader's value, whatever the others pass. Collective."""
    assert _host, "initialize comes first"
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, group=_host.world)
    return box[0]
