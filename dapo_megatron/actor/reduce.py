"""Brings together what ranks have parts of: the sums that a loss asks for, and the measures of a mini-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from dapo_megatron.measures import Measure, Measures, reduce


class SumOverRanks(torch.autograd.Function):
    """Add up a tensor over a group; the gradient is added up over it, too. Collective, forward and backward."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return SumOverRanks.forward(ctx, grads[0], ctx.group), None


def over_ranks(parts: Sequence[Measures], groups: ProcessGroupCollection, device: torch.device) -> dict[str, Measure]:
    """Bring the measures of all micro-batches of all ranks together. Collective; every rank gets them.

    Args:
        parts: the measures of each micro-batch of this rank. Only those of the last pipeline stage count, which alone
            sees the loss.
    """
    stages: Any = groups.pp
    replicas: Any = groups.dp_cp

    # Measures may be plain numbers, of which nobody knows that NCCL wants them on the GPU.
    def add(totals: Tensor) -> Tensor:
        totals = totals.to(device)
        dist.all_reduce(totals, group=replicas)
        return totals

    def largest(values: Tensor) -> Tensor:
        values = torch.where(values.isnan(), torch.inf, values).to(device)  # a maximum over ranks may drop nan
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=replicas)
        return values

    box: list[Any] = [reduce(parts, add, largest) if stages.rank() == stages.size() - 1 else None]
    if stages.size() > 1:
        dist.broadcast_object_list(box, group_src=stages.size() - 1, group=stages, device=device)
    return box[0]
