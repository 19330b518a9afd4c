"""The segments of a packed micro-batch: from slots to sequences and back."""

from __future__ import annotations

import torch
from torch import Tensor


def segments(cu_seqlens: Tensor, slots: int | None = None) -> Tensor:
    """int64 [T]: the segment of each slot. `cu_seqlens` is int32 [S+1] as in `types.MicroBatch`.

    Args:
        slots: T; where it is given, a GPU need not be waited for.
    """
    return torch.repeat_interleave(cu_seqlens.diff().long(), output_size=slots)


def segment_sums(values_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S], in the dtype of `values_T`, floating; differentiable. A sequence has the same sum wherever it lies."""
    return torch.segment_reduce(values_T, "sum", lengths=cu_seqlens.diff().long(), unsafe=True)
