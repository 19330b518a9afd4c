"""Exact means over a mini-batch: sums and counts travel between ranks, never means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor


def token_means(
    parts: Sequence[dict[str, Tensor]], loss_tokens: int, groups: ProcessGroupCollection, device: torch.device
) -> dict[str, float]:
    """Metrics of the whole mini-batch from those of this rank's micro-batches. Collective; every rank gets them.

    Args:
        parts: one per micro-batch, on ranks of the last pipeline stage: 0-d sums over loss tokens, or maxima where the
            name ends in `_max`. What other stages pass is ignored.
        loss_tokens: what the sums are divided by.
    """
    means: dict[str, float] = {}
    stages: Any = groups.pp
    if stages.rank() == stages.size() - 1:
        names = sorted(parts[0])
        maxima = [name for name in names if name.endswith("_max")]
        sums = [name for name in names if not name.endswith("_max")]
        replicas: Any = groups.dp_cp
        if sums:
            total = _stacked(parts, sums, device).sum(0)
            dist.all_reduce(total, group=replicas)
            means |= dict(zip(sums, (total / max(loss_tokens, 1)).tolist(), strict=True))
        if maxima:
            largest = _stacked(parts, maxima, device).amax(0)
            largest = torch.where(largest.isnan(), torch.inf, largest)  # a maximum over ranks may drop nan
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=replicas)
            means |= dict(zip(maxima, largest.tolist(), strict=True))
    if stages.size() > 1:
        box: list[Any] = [means]
        dist.broadcast_object_list(box, group_src=stages.size() - 1, group=stages, device=device)
        means = box[0]
    return means


def _stacked(parts: Sequence[dict[str, Tensor]], names: list[str], device: torch.device) -> Tensor:
    """float64 [micro-batches, names]."""
    return torch.stack([torch.stack([part[name].detach().double() for name in names]) for part in parts]).to(device)
