"""How tensors lie in a bucket: sender and receiver share these functions, so they cannot disagree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

Named = list[tuple[str, Tensor]]

HOST = torch.device("cpu")

_ALIGNMENT = 16
"""Bytes: no dtype has larger elements."""
_NEARLY = 0.75
"""A bucket that is fuller than this is nearly full."""
_LARGE = 1 << 20
"""Bytes: a copy of so many costs more than another message."""


def numbered(
    weights: Iterable[tuple[str, Tensor]], bucket_bytes: int, before_each: Callable[[], object] = lambda: None
) -> Iterator[tuple[int, str, Tensor]]:
    """Yield `weights` as they come, each with the number of its bucket, from 0.

    A bucket holds at most `bucket_bytes`, or one larger tensor. One that is nearly full ends where a block of a layer
    does (attention, feed-forward), because an engine keeps what it has of a layer until it has the rest.

    Args:
        before_each: called before the weights of a bucket are taken, but for the first of these, which shows that the
            one before is whole. Where ranks gather what one of them uses bucket by bucket, they wait for it there.
    """
    number, size, block = 0, 0, ""
    before_each()
    for name, tensor in weights:
        last, block = block, name.rpartition(".")[0].rpartition(".")[0]
        start = _aligned(size)
        if size and (start + tensor.nbytes > bucket_bytes or (size > _NEARLY * bucket_bytes and block != last)):
            number, start = number + 1, 0
        begins, size = number and not start, start + tensor.nbytes
        yield number, name, tensor
        if begins:
            before_each()  # once whoever takes them has come back from using the bucket before


def buckets(
    weights: Iterable[tuple[str, Tensor]], bucket_bytes: int, before_each: Callable[[], object] = lambda: None
) -> Iterator[Named]:
    """Group `weights` as `numbered` does. Only one bucket is in memory at a time."""
    return grouped(numbered(weights, bucket_bytes, before_each))


def grouped(weights: Iterable[tuple[int, str, Tensor]]) -> Iterator[Named]:
    """Group what `numbered` gives."""
    bucket: Named = []
    current = 0
    for number, name, tensor in weights:
        if number != current:
            yield bucket
            bucket, current = [], number
        bucket.append((name, tensor))
    if bucket:
        yield bucket


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
    """The bytes of a bucket's tensors as `offsets` places them: contiguous uint8 on CPU."""
    starts, size = offsets([tensor.nbytes for _, tensor in bucket])
    flat = torch.empty(size, dtype=torch.uint8, device=bucket[0][1].device)
    for start, (_, tensor) in zip(starts, bucket, strict=True):
        put(tensor, flat, start)
    return flat.cpu()


def put(tensor: Tensor, flat: Tensor, start: int) -> Tensor:
    """Copy a tensor's bytes into `flat`; returns where they are, in its own dtype and shape."""
    place = flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return place.copy_(tensor.detach())


def offsets(nbytes: Iterable[int]) -> tuple[list[int], int]:
    """Where tensors of these sizes start in a flat bucket, and its size.

    They lie one behind the other, each where it can be viewed in any dtype.
    """
    starts: list[int] = []
    end = 0
    for size in nbytes:
        starts.append(_aligned(end))
        end = starts[-1] + size
    return starts, end


def is_large(nbytes: int) -> bool:
    """Whether a tensor of this size is a piece of its own."""
    return nbytes >= _LARGE


def pieces(nbytes: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """Yield the pieces of a flat bucket that are sent one by one: each large tensor, and what lies between two.

    Args:
        nbytes: of each of its tensors.

    Yields:
        The index of the first tensor of a piece, and where in the bucket the piece starts and ends.
    """
    sizes = list(nbytes)
    starts, _ = offsets(sizes)
    for large, run in groupby(range(len(sizes)), lambda index: is_large(sizes[index])):
        members = list(run)
        if large:
            yield from ((index, starts[index], starts[index] + sizes[index]) for index in members)
        else:
            yield members[0], starts[members[0]], starts[members[-1]] + sizes[members[-1]]


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, uint8: where they are if it is contiguous, otherwise a copy."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def unflatten(flat: Tensor, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> Named:
    """The tensors of a flat bucket, as views of it."""
    sizes = [nbytes(*spec) for spec in zip(dtypes, shapes, strict=True)]
    starts, _ = offsets(sizes)
    return [
        (name, flat[start : start + size].view(getattr(torch, dtype)).view(tuple(shape)))
        for name, start, size, dtype, shape in zip(names, starts, sizes, dtypes, shapes, strict=True)
    ]


def allocate(dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> Tensor:
    """Room for a flat bucket."""
    return torch.empty(flat_bytes(dtypes, shapes), dtype=torch.uint8)


def flat_bytes(dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> int:
    """Size of a flat bucket."""
    return offsets(nbytes(*spec) for spec in zip(dtypes, shapes, strict=True))[1]


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    return torch.Size(shape).numel() * getattr(torch, dtype).itemsize


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
