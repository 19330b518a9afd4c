"""Gathers and reduce-scatters parts of different lengths, which gloo cannot: tokens that tensor-parallel ranks of an
expert-parallel rank were sent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor


def install() -> None:
    """Replace the functions that Megatron has for them."""
    mappings: Any = sys.modules["megatron.core.tensor_parallel.mappings"]
    even_gather: Callable[..., Tensor] = mappings._gather_along_first_dim
    even_reduce_scatter: Callable[..., Tensor] = mappings._reduce_scatter_along_first_dim

    def gather(
        input_: Tensor, group: Any, output_split_sizes: Sequence[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(input_, group, None, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        whole = input_.new_zeros(sum(sizes), *input_.shape[1:])
        whole.split(sizes)[group.rank()].copy_(input_)
        dist.all_reduce(whole, group=group)
        return whole

    def reduce_scatter(
        input_: Tensor, group: Any, input_split_sizes: Sequence[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return even_reduce_scatter(input_, group, None, use_global_buffer)
        whole = input_.contiguous().clone()
        dist.all_reduce(whole, group=group)
        return whole.split([int(size) for size in input_split_sizes])[group.rank()].clone()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, reduce_scatter
