"""Exact means over a mini-batch: sums and counts travel between ranks, never means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor


def token_means(parts: Sequence[dict[str, Tensor]], loss_tokens: int, device: torch.device) -> dict[str, float]:
    """Metrics of the whole mini-batch from those of this rank's micro-batches. Collective; every rank gets them.

    Args:
        parts: one per micro-batch, on ranks of the last pipeline stage: 0-d sums over loss tokens, or maxima where the
            name ends in `_max`. What other stages pass is ignored.
        loss_tokens: what the sums are divided by.
    """
    means: dict[str, float] = {}
    if mpu.is_pipeline_last_stage(ignore_virtual=True):
        names = sorted(parts[0])
        maxima = [name for name in names if name.endswith("_max")]
        sums = [name for name in names if not name.endswith("_max")]
        replicas: Any = mpu.get_data_parallel_group(with_context_parallel=True)
        if sums:
            total = _stacked(parts, sums, device).sum(0)
            dist.all_reduce(total, group=replicas)
            means |= dict(zip(sums, (total / max(loss_tokens, 1)).tolist(), strict=True))
        if maxima:
            largest = _stacked(parts, maxima, device).amax(0)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=replicas)
            means |= dict(zip(maxima, largest.tolist(), strict=True))
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        box: list[Any] = [means]
        last = mpu.get_pipeline_model_parallel_last_rank()
        stages: Any = mpu.get_pipeline_model_parallel_group()
        dist.broadcast_object_list(box, src=last, group=stages, device=device)
        means = box[0]
    return means


def _stacked(parts: Sequence[dict[str, Tensor]], names: list[str], device: torch.device) -> Tensor:
    """float64 [micro-batches, names]."""
    return torch.stack([torch.stack([part[name].detach().double() for name in names]) for part in parts]).to(device)
