"""What is measured of a mini-batch, brought together over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from dapo_megatron.measures import Measure, Measures, reduce


def over_ranks(parts: Sequence[Measures], groups: ProcessGroupCollection, device: torch.device) -> dict[str, Measure]:
    """Bring the measures of this rank's micro-batches and all other ranks' together. Collective; every rank gets them.

    Args:
        parts: one per micro-batch, on ranks of the last pipeline stage, which alone sees the loss. What other stages
            pass is ignored.
    """
    stages: Any = groups.pp
    replicas: Any = groups.dp_cp

    def add(totals: Tensor) -> Tensor:
        dist.all_reduce(totals, group=replicas)
        return totals

    def largest(values: Tensor) -> Tensor:
        values = torch.where(values.isnan(), torch.inf, values)  # a maximum over ranks may drop nan
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=replicas)
        return values

    box: list[Any] = [reduce(parts, add, largest) if stages.rank() == stages.size() - 1 else None]
    if stages.size() > 1:
        dist.broadcast_object_list(box, group_src=stages.size() - 1, group=stages, device=device)
    return box[0]
