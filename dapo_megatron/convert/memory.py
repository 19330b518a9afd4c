"""The memory of tensors as bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_AT_ONCE = 1 << 30


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the numbers of a tensor on the CPU, in row-major order; its own memory where that is contiguous."""
    flat: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def read_exactly(file: Any, memory: Tensor) -> None:
    """Fill a contiguous tensor from a file opened for reading bytes.

    Raises:
        ValueError: where the file ends before.
    """
    view = bytes_of(memory)
    while view:
        count = file.readinto(view[:_AT_ONCE])
        if not count:
            raise ValueError(f"it ends {len(view):,} bytes too early")
        view = view[count:]


def write_exactly(file: Any, tensor: Tensor) -> None:
    """Write the numbers of a tensor to a file opened for writing bytes, without a buffer of its own."""
    view = bytes_of(tensor)
    while view:
        view = view[file.write(view[:_AT_ONCE]) :]
