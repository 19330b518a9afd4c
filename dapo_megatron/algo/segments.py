"""Goes from the slots of a packed micro-batch to its segments and back."""

from __future__ import annotations

import torch
from torch import Tensor


def segments(cu_seqlens: Tensor, slots: int | None = None) -> Tensor:
    """Return the segment of each slot, int64 [T]; `cu_seqlens` is int32 [S+1] as in `types.MicroBatch`.

    Args:
        slots: T; where it is given, nobody has to wait for a GPU.
    """
    return torch.repeat_interleave(cu_seqlens.diff().long(), output_size=slots)


def segment_sums(values_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Add up each segment, wherever it lies: [S], in the dtype of `values_T`, which is floating; differentiable."""
    return torch.segment_reduce(values_T, "sum", lengths=cu_seqlens.diff().long(), unsafe=True)
