"""How tensors lie in a bucket: sender and receiver share these functions, so they cannot disagree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Named = list[tuple[str, Tensor]]


def buckets(
    weights: Iterable[tuple[str, Tensor]], bucket_bytes: int, before_each: Callable[[], object] = lambda: None
) -> Iterator[Named]:
    """Group `weights`, as they come, so that a bucket holds at most `bucket_bytes` or one larger tensor.

    Only one bucket is in memory at a time. In a bucket, the dtypes with the largest elements come first: end to end,
    every tensor then starts at a multiple of its element's size, so that it can be viewed in its own dtype.

    Args:
        before_each: called before the weights of a bucket are taken. Where ranks gather what one of them uses bucket by
            bucket, they wait for it there.
    """
    bucket: Named = []
    size = 0
    before_each()
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield _aligned(bucket)
            before_each()
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield _aligned(bucket)


def only_sizes(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Take `weights` without keeping them: the same names, dtypes and shapes, without the data.

    A rank that only helps to gather groups them like the one that uses them.
    """
    return ((name, tensor.to("meta")) for name, tensor in weights)


def describe(bucket: Named) -> dict[str, Any]:
    """Return names, dtypes and shapes (`verify.Inventory`); JSON."""
    return {
        "names": [name for name, _ in bucket],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def flatten(bucket: Named) -> Tensor:
    """The bytes of a bucket's tensors, end to end: contiguous uint8 on CPU."""
    return torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in bucket]).cpu()


def allocate(dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> Tensor:
    """Room for a flat bucket."""
    return torch.empty(sum(_nbytes(*spec) for spec in zip(dtypes, shapes, strict=True)), dtype=torch.uint8)


def unflatten(flat: Tensor, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> Named:
    """The tensors of a flat bucket, as views of it."""
    parts = flat.split([_nbytes(*spec) for spec in zip(dtypes, shapes, strict=True)])
    return [
        (name, part.view(getattr(torch, dtype)).view(tuple(shape)))
        for name, part, dtype, shape in zip(names, parts, dtypes, shapes, strict=True)
    ]


def _aligned(bucket: Named) -> Named:
    return sorted(bucket, key=lambda named: -named[1].itemsize)


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    return torch.Size(shape).numel() * getattr(torch, dtype).itemsize
