"""The segments of a packed micro-batch: from slots to sequences and back."""

from __future__ import annotations

import torch
from torch import Tensor


def segments(cu_seqlens: Tensor) -> Tensor:
    """int64 [T]: the segment of each slot. `cu_seqlens` int32 [S+1] as in `types.MicroBatch`."""
    return torch.repeat_interleave(cu_seqlens.diff().long())


def segment_sums(values_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S], in the dtype of `values_T`. Slots are added in their order: a sequence has the same sum wherever it lies."""
    sums_S = values_T.new_zeros(cu_seqlens.shape[0] - 1)
    return sums_S.index_add_(0, segments(cu_seqlens), values_T)
