"""A checksum of a tensor's bytes: two sums over all of them, the same on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORD_BYTES = 8
_ROW_WORDS = 1024
_TILE_ROWS = 64
"""512 KiB, which a core's cache holds."""
_STEP = 0x1E3779B97F4A7C15
_FACTOR = 0x3F58476D1CE4E5B9
"""Odd, so that multiplying by them modulo 2**64 can be undone."""


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Return a number of 64 bits, signed, for the bytes of each tensor.

    The bytes are words of 64 bits in rows of 1024. The sums of all columns and rows, modulo 2**64, and the words of the
    last, incomplete row are each scrambled with their place, and added up: what happens to one word changes two of the
    sums, and what changes places changes more. Integers have the same sum in any order.
    """
    return read([checksum(tensor) for tensor in tensors])


def read(found: Sequence[Tensor]) -> list[int]:
    """Bring checksums to the host, together: each by itself would wait for the device."""
    return torch.stack(list(found)).tolist() if found else []


def checksum(tensor: Tensor) -> Tensor:
    """The checksum of one tensor: 0-d int64, on its device, which is not waited for."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if gap := -data.numel() % _WORD_BYTES:
        data = torch.cat([data, data.new_zeros(gap)])
    elif data.storage_offset() % _WORD_BYTES:
        data = data.clone()
    words = data.view(torch.int64)
    rows = words.numel() // _ROW_WORDS
    block, rest = words.split([rows * _ROW_WORDS, words.numel() - rows * _ROW_WORDS])
    block = block.view(rows, _ROW_WORDS)
    # On CPU, the second sum of a tile finds it in the cache.
    tiles = block.split(_TILE_ROWS if data.device.type == "cpu" else max(1, rows))
    sums = [(tile.sum(1), tile.sum(0)) for tile in tiles]
    columns = torch.stack([of_columns for _, of_columns in sums]).sum(0)
    parts = torch.cat([columns, *(of_rows for of_rows, _ in sums), rest])
    return _scrambled(parts + _STEP * torch.arange(parts.numel(), device=parts.device)).sum()


def _scrambled(numbers: Tensor) -> Tensor:
    """Map 64 bits to 64 bits one to one, so that each bit of a number has a part in most bits of the result.

    Otherwise the highest bits of the words would only change the highest of a sum, and two of them nothing.
    """
    for _ in range(2):
        # What is shifted in is the sign; what has to be is zeros.
        numbers = (numbers ^ (numbers >> 32 & 0xFFFFFFFF)) * _FACTOR
    return numbers ^ (numbers >> 32 & 0xFFFFFFFF)
