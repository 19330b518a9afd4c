"""Follows memory, matrix products and collectives of what runs, on real and on fake tensors alike."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._meta_registrations import create_fakework
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

_MATRIX_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}
_WITHOUT_META = {
    torch.ops.c10d.allreduce_coalesced_.default,
    torch.ops.c10d.allgather_into_tensor_coalesced_.default,
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default,
}
"""Collectives for which torch has no implementation on fake tensors."""


@dataclass(frozen=True, slots=True)
class Collective:
    """A call by this rank.

    >>> Collective("allreduce", "TENSOR_MODEL_PARALLEL_GROUP", (0, 1), 4096).bytes
    4096
    """

    kind: str
    """torch's name of the operation: allreduce, _allgather_base, _reduce_scatter_base, broadcast, send, recv, ..."""
    group: str
    """Megatron's name of the group; "default_pg" is all ranks."""
    ranks: tuple[int, ...]
    bytes: int
    """The tensor on this rank; where input and output differ in size, the larger, which all ranks share."""


class Tracker(TorchDispatchMode):
    """Sees every operation that torch runs inside, those of the backward pass included.

    A storage counts, with its nominal size, from the operation that first returned it to its end: what an allocator
    adds, and what an operation allocates for itself, stays unseen.

    Args:
        number: what is read from a fake tensor that is to give a number, for it has none.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number
        self.live = 0
        """Bytes of all storages that are alive."""
        self.peak = 0
        """The most that `live` was since the last `restart`."""
        self.flops = 0
        """Of matrix products without attention, 2 for a multiplication with its addition, since the last `restart`."""
        self.collectives: list[Collective] = []
        """Since the last `restart`."""
        self._known: set[int] = set()

    def restart(self) -> None:
        self.peak, self.flops, self.collectives = self.live, 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._number
        if func in _WITHOUT_META and any(isinstance(leaf, FakeTensor) for leaf in tree_iter(args)):
            result = create_fakework(args, return_first_arg=False)
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        if func._overloadpacket in _MATRIX_PRODUCTS:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        elif func.namespace == "c10d":
            self._record(func, args)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def _record(self, func: Any, args: Sequence[Any]) -> None:
        boxed = next((arg for arg in args if isinstance(arg, torch.ScriptObject)), None)
        if boxed is None:
            return
        group = dist.ProcessGroup.unbox(boxed)
        sizes = [sum(leaf.nbytes for leaf in tree_iter(arg) if isinstance(leaf, Tensor)) for arg in args]
        kind, ranks = func._opname.removesuffix("_"), tuple(dist.get_process_group_ranks(group))
        self.collectives.append(Collective(kind, group.group_desc, ranks, max(sizes)))
