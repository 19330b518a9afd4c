"""Knows who is where: the ranks of a run, their groups, and what they tell one another through host memory.

Ranks count tensor parallel fastest, then context, data, and pipeline parallel (Megatron's own order):
rank = tp_rank + tp x (cp_rank + cp x (dp_rank + dp x pp_rank)).

The leader (rank 0) talks to engines and writes files. Each data-parallel replica has a leader of its own, its first
rank, which speaks for it where all ranks of a replica hold the same.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.rendezvous import rendezvous as torch_rendezvous

from dapo_megatron.actor import interface
from dapo_megatron.config import ParallelConfig
from dapo_megatron.errors import ConfigError, DapoError
from dapo_megatron.mkl import choose_functions

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long a collective may take. No rank waits in one for what the leader does alone (`heartbeat`)."""

CHUNK_BYTES = 1 << 30
"""What goes to another rank in one message at the most."""

_LOOPBACK = "lo"


@dataclass(frozen=True, slots=True)
class Topology:
    """Where this process stands, and the way to the other ranks. Methods are collective over all ranks."""

    rank: int
    world_size: int
    tp: int
    pp: int
    cp: int
    dp: int
    cp_rank: int
    dp_rank: int
    host_world: dist.ProcessGroup = field(repr=False)
    """All ranks, over gloo, for what lies in host memory; so are the next two."""
    host_replica: dist.ProcessGroup = field(repr=False)
    """The ranks of this replica."""
    host_leaders: dist.ProcessGroup = field(repr=False)
    """The leaders of all replicas; on other ranks, no group."""

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    @property
    def is_replica_leader(self) -> bool:
        return dist.get_rank(self.host_replica) == 0

    @property
    def device(self) -> torch.device:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def scatter(self, share: Callable[[int], Sequence[Tensor]] | None) -> list[Tensor]:
        """Give every rank the tensors of its data-parallel replica. The others wait here for the leader.

        Args:
            share: on the leader, makes the tensors of a replica, in host memory, with any number, shapes and dtypes; it
                is asked for one replica after the other, so that the leader holds one share at a time. None elsewhere.
        """
        if self.is_leader and share is None:
            raise ValueError("scatter wants the leader to say what each data-parallel replica gets; it got None")
        tensors: list[Tensor] = []
        # To one rank of each replica, which hands it on: the leader would otherwise send a copy to every rank.
        if share is not None and self.is_leader:
            for replica in range(1, self.dp):
                _send(share(replica), self.host_leaders, replica)
            tensors = [tensor.contiguous() for tensor in share(0)]
        elif self.is_replica_leader:
            tensors = _receive(self.host_leaders)
        return _hand_on(tensors, self.host_replica)

    def gather(self, value: T) -> list[T] | None:
        """Collect the value of every replica on the leader, elsewhere return None. Values are pickled."""
        entries: list[Any] | None = [None] * self.dp if self.is_leader else None
        if self.is_replica_leader:
            dist.gather_object(value, entries, dst=0, group=self.host_leaders)
        return entries

    def collect(self, text: str) -> list[str] | None:
        """Return on the leader the text of each rank, in their order; elsewhere None. Texts are pickled."""
        texts: list[Any] | None = [None] * self.world_size if self.is_leader else None
        dist.gather_object(text, texts, dst=0, group=self.host_world)
        return texts

    def broadcast(self, value: T | None) -> T:
        """Give every rank the leader's value, whatever the others pass."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_world)
        return box[0]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over replicas, each counted once, what all ranks of a replica hold alike.

        Args:
            values: in host memory, of the same shape and dtype on all ranks.

        Returns:
            A new tensor in host memory.
        """
        own = values.clone() if self.is_replica_leader else torch.zeros_like(values)
        dist.all_reduce(own, group=self.host_world)
        return own

    def max(self, values: Tensor) -> Tensor:
        """Take the largest of each entry over all ranks; otherwise as `sum`.

        Floating only; nan counts as inf, which no backend drops.
        """
        own = torch.where(values.isnan(), torch.inf, values)
        dist.all_reduce(own, op=dist.ReduceOp.MAX, group=self.host_world)
        return own


def on_one_machine() -> bool:
    """Return whether torchrun has started all ranks on this machine."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE", "1")


def prepare() -> None:
    """Load Megatron and choose the device. Both hold the interpreter's lock, on cold machines for many seconds.

    Raises:
        ConfigError: where there is no GPU for this rank.
    """
    importlib.import_module("megatron.core.tensor_parallel")
    if not torch.cuda.is_available():
        from dapo_megatron.actor import cpu

        cpu.enable()
        return
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    # Slurm can show each task a GPU of its own, and no other. To torchrun's ranks, the same ones are visible.
    own = count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ
    if local_rank >= count and not own:
        raise ConfigError(f"local rank {local_rank} has no GPU: {count} are visible; start at most {count} ranks here")
    torch.cuda.set_device(0 if own else local_rank)
    torch.cuda.init()


def rendezvous(timeout: timedelta = TIMEOUT) -> Store:
    """Return what torchrun's ranks find one another by; without torchrun, this is a run of one process.

    Args:
        timeout: how long ranks wait for one another there (launch.join_seconds).

    Raises:
        DapoError: where they do so in vain.
    """
    if "MASTER_ADDR" not in os.environ:
        return HashStore()
    try:
        store, _, _ = next(torch_rendezvous("env://", timeout=timeout))
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
        raise DapoError(
            f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} could not meet the others at {place} "
            f"within launch.join_seconds({timeout.total_seconds():g}): {str(error).splitlines()[0]}"
        ) from error
    return store


def _choose_interface(rank: int, world_size: int, store: Store) -> None:
    """Tell gloo where to listen, unless the user has."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        interface.tell(rank, store)  # others may wait for it
        return
    if on_one_machine():
        # Ranks of one machine have no business on its network.
        if _LOOPBACK in dict(socket.if_nameindex()).values():
            os.environ["GLOO_SOCKET_IFNAME"] = _LOOPBACK
    elif world_size > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = interface.find_interface(os.environ["MASTER_ADDR"], rank, world_size, store)


def is_lost_peer(error: BaseException) -> bool:
    """Return whether a collective raised `error` because it cannot go on with the other ranks: one is gone or late."""
    # NCCL and the store have classes for it, gloo has only words.
    words = any(word in str(error) for word in ("Connection", "Timed out", "timeout"))
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and words)


def _send(tensors: Sequence[Tensor], group: dist.ProcessGroup, to: int) -> None:
    """Send tensors to rank `to` of the group, which calls `_receive`."""
    tensors = [tensor.contiguous() for tensor in tensors]
    dist.send_object_list([_forms(tensors)], group_dst=to, group=group)
    for part in _parts(tensors):
        dist.send(part, group_dst=to, group=group)


def _receive(group: dist.ProcessGroup) -> list[Tensor]:
    """Receive what the first rank of the group sends."""
    forms: list[Any] = [None]
    dist.recv_object_list(forms, group_src=0, group=group)
    tensors = _empty(forms[0])
    for part in _parts(tensors):
        dist.recv(part, group_src=0, group=group)
    return tensors


def _hand_on(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Give all ranks of the group the contiguous tensors of its first."""
    forms: list[Any] = [_forms(tensors)]
    dist.broadcast_object_list(forms, group_src=0, group=group)
    own = list(tensors) if dist.get_rank(group) == 0 else _empty(forms[0])
    for part in _parts(own):
        dist.broadcast(part, group_src=0, group=group)
    return own


def _forms(tensors: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors]


def _empty(forms: Sequence[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype) for shape, dtype in forms]


def _parts(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the memory of contiguous tensors, uint8, at most CHUNK_BYTES at a time."""
    for tensor in tensors:
        if tensor.numel():
            yield from tensor.view(-1).view(torch.uint8).split(CHUNK_BYTES)


def initialize(
    parallel: ParallelConfig, *, seed: int = 0, timeout: timedelta = TIMEOUT, store: Store | None = None
) -> Topology:
    """Join the process group and split it. Reads torchrun's environment; without it, this is a run of one process.

    Args:
        seed: the seed of torch and of Megatron's random states.
        timeout: how long a collective may take.
        store: what `rendezvous` gave, where it was called before.

    Raises:
        ConfigError: where the number of ranks does not divide among the axes.
    """
    prepare()
    choose_functions()
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    dp = parallel.data_parallel(world_size)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = store or rendezvous(timeout)
    _choose_interface(rank, world_size, store)
    store.set_timeout(timeout)  # ranks may have had longer to come to the rendezvous
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        distributed_timeout_minutes=timeout.total_seconds() / 60,  # pyright: ignore[reportArgumentType]
        create_gloo_process_groups=False,
    )
    block = parallel.tp * parallel.cp
    members = [[rank for rank in range(world_size) if rank // block % dp == replica] for replica in range(dp)]
    world, leaders, *replicas = (
        cast(dist.ProcessGroup, dist.new_group(ranks, backend="gloo", timeout=timeout))
        for ranks in (None, [first for first, *_ in members], *members)
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return Topology(
        rank=rank,
        world_size=world_size,
        tp=parallel.tp,
        pp=parallel.pp,
        cp=parallel.cp,
        dp=dp,
        cp_rank=mpu.get_context_parallel_rank(),
        dp_rank=mpu.get_data_parallel_rank(),
        host_world=world,
        host_replica=replicas[rank // block % dp],
        host_leaders=leaders,
    )


def shutdown() -> None:
    """Leave the process group, all ranks together. Does nothing where there is none.

    Not for a rank that failed: the others do not come here, and NCCL's end of a group waits for all of a machine.
    """
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state as mpu

    dist.barrier(device_ids=[torch.cuda.current_device()] if torch.cuda.is_available() else None)
    mpu.destroy_model_parallel()
    dist.destroy_process_group()


def process_groups() -> ProcessGroupCollection:
    """Return Megatron's groups of this rank, to be handed on by name rather than looked up wherever they are used."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()
