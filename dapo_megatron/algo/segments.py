"""Goes from the slots of a packed micro-batch to its segments and back."""

from __future__ import annotations

import torch
from torch import Tensor


def check_slots(mask_T: Tensor, *others_T: Tensor | None) -> None:
    """Assert that all that are given are [T], T > 0, and the mask is bool."""
    shapes = [tuple(tensor.shape) for tensor in (mask_T, *others_T) if tensor is not None]
    assert mask_T.ndim == 1 and len(mask_T) and len(set(shapes)) == 1, f"all must be [T] and alike, got {shapes}"
    assert mask_T.dtype == torch.bool, f"the mask must be bool, got {mask_T.dtype}"


def segments(cu_seqlens: Tensor, slots: int | None = None) -> Tensor:
    """Return the segment of each slot, int64 [T]; `cu_seqlens` is int32 [S+1] as in `types.MicroBatch`.

    Args:
        slots: T; where it is given, nobody has to wait for a GPU.
    """
    return torch.repeat_interleave(cu_seqlens.diff().long(), output_size=slots)


def segment_sums(values_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Add up each segment, wherever it lies: [S], in the dtype of `values_T`, which is floating; differentiable."""
    return torch.segment_reduce(values_T, "sum", lengths=cu_seqlens.diff().long(), unsafe=True)
