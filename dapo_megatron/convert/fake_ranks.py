"""Ranks that do not exist: one process has Megatron's groups of a mesh of any size, and may be any rank of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dapo_megatron.config import ParallelConfig

if TYPE_CHECKING:
    from dapo_megatron.actor.topology import Topology


@contextmanager
def fake_ranks(parallel: ParallelConfig, *, world_size: int, rank: int) -> Iterator[Topology]:
    """Be `rank` of `world_size` ranks that do not exist; afterwards, there is no process group.

    Raises:
        RuntimeError: where the process sees a GPU or has a process group.
    """
    if torch.cuda.is_available():
        raise RuntimeError(
            "fake ranks use the CPU layer spec, but torch sees a GPU; start with CUDA_VISIBLE_DEVICES=''"
        )
    if dist.is_initialized():
        raise RuntimeError("this process is in a process group already, and fake ranks are one; use another process")
    from megatron.core import parallel_state

    from dapo_megatron.actor import topology

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for patched in _patches_for_groups(world_size, rank):
            stack.enter_context(patched)
        try:
            yield topology.initialize(parallel, store=HashStore())
        finally:
            parallel_state.destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()


def _patches_for_groups(world_size: int, rank: int) -> Iterator[AbstractContextManager[Any]]:
    """Yield what has to be different for groups of ranks that do not exist."""
    from torch.testing._internal.distributed import fake_pg

    assert fake_pg  # its import registers the backend
    count = str(world_size)
    # A process group has the trace of an error begin with its rank, and leaves that behind.
    yield patch.object(sys, "excepthook", sys.excepthook)
    # Where `topology.initialize` reads which rank this is.
    yield patch.dict(os.environ, {"RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count})

    # It asks for gloo by name, and so do some groups of Megatron.
    def with_fake_backend(make: Callable[..., Any]) -> Callable[..., Any]:
        def make_fake(*args: Any, **kwargs: Any) -> Any:
            bound = signature(make).bind(*args, **kwargs)
            bound.arguments["backend"] = "fake"
            return make(*bound.args, **bound.kwargs)

        return make_fake

    for name in ("init_process_group", "new_group"):
        yield patch.object(dist, name, with_fake_backend(getattr(dist, name)))

    # Megatron compares the optimizer's groups of parameters over ranks. Pickles of ranks that do not exist cannot be
    # read: all ranks say what this one does.
    def all_gather_object(objects: list[Any], own: Any, group: Any = None) -> None:
        objects[:] = [own] * len(objects)

    yield patch.object(dist, "all_gather_object", all_gather_object)

    # For the same reason this rank broadcasts, whoever should. What it has is then what it keeps.
    broadcast = dist.broadcast_object_list

    def broadcast_object_list(objects: list[Any], *args: Any, group: Any = None, device: Any = None, **_: Any) -> None:
        with unset_fake_temporarily():
            broadcast(objects, group_src=dist.get_rank(group), group=group, device=device)

    yield patch.object(dist, "broadcast_object_list", broadcast_object_list)
