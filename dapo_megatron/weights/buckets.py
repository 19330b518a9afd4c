"""How tensors lie in a bucket: sender and receiver share these functions, so they cannot disagree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16
"""Every tensor starts at a multiple of this many bytes, so that it can be viewed in its own dtype."""

Named = list[tuple[str, Tensor]]


def buckets(weights: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[Named]:
    """Group `weights`, in order and as they come, so that a bucket holds at most `bucket_bytes` or one larger tensor.

    Only one bucket is in memory at a time.
    """
    bucket: Named = []
    size = 0
    for name, tensor in weights:
        if bucket and size + _padded(tensor.nbytes) > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += _padded(tensor.nbytes)
    if bucket:
        yield bucket


def describe(bucket: Named) -> dict[str, Any]:
    """What the receiver needs to know before the bytes come; JSON."""
    return {
        "names": [name for name, _ in bucket],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def pack(bucket: Named) -> Tensor:
    """The tensors of a bucket as bytes: contiguous uint8 on CPU."""
    flat = torch.empty(sum(_padded(tensor.nbytes) for _, tensor in bucket), dtype=torch.uint8)
    start = 0
    for _, tensor in bucket:
        view = flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor.detach())
        start += _padded(tensor.nbytes)
    return flat


def allocate(dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> Tensor:
    """Room for a packed bucket."""
    return torch.empty(sum(_padded(_nbytes(*spec)) for spec in zip(dtypes, shapes, strict=True)), dtype=torch.uint8)


def unpack(flat: Tensor, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> Named:
    """The tensors of a packed bucket, as views of it."""
    bucket: Named = []
    start = 0
    for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
        size = _nbytes(dtype, shape)
        bucket.append((name, flat[start : start + size].view(getattr(torch, dtype)).view(tuple(shape))))
        start += _padded(size)
    return bucket


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    return torch.Size(shape).numel() * getattr(torch, dtype).itemsize


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
