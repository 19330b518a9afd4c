"""Runs inside SGLang's scheduler process on CPU: what its mode of deterministic inference lacks there.

SGLang has that mode for GPUs. With what is here, seeds of requests are heeded, and a sequence comes to the same alone
as among others.
"""

# SGLang is in an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

import torch
from sglang.srt import batch_invariant_ops
from sglang.srt.layers import sampler
from sglang.srt.layers.rotary_embedding import base as rotary_embedding
from torch import Tensor
from torch.nn.functional import pad

ROWS = 64
"""Rows that are multiplied at a time. Fewer cost more where there are many, and more where there are few."""

_MASK = 0xFFFFFFFF
_IN_BLOCKS = torch.library.Library("aten", "IMPL")


def keep_sequences_apart() -> None:
    """Put these in the places of SGLang's kernels for GPUs, before it makes a model."""
    sampler.murmur_hash32 = murmur_hash32
    batch_invariant_ops.enable_batch_invariant_mode = multiply_in_blocks
    # Torch's own. Otherwise it wants a kernel of vLLM's.
    rotary_embedding._is_cpu = True


def multiply_in_blocks() -> None:
    """Have every product of matrices on CPU made of products of `ROWS` rows.

    MKL cuts a sum in another way for few rows than for many, and for many by the number of threads.
    """
    _IN_BLOCKS.impl("mm", mm, "CPU")
    _IN_BLOCKS.impl("addmm", addmm, "CPU")


def mm(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K] @ weight [K, N]: the row of a token does not depend on the others."""
    rows = len(x)
    blocks = -(-rows // ROWS)
    padded = pad(x, (0, 0, 0, blocks * ROWS - rows))
    result = x.new_empty(blocks * ROWS, weight.shape[1])
    for start in range(0, blocks * ROWS, ROWS):
        block = slice(start, start + ROWS)
        torch.mm(padded[block], weight, out=result[block])
    return result[:rows]


def addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return bias * beta + mm(x, weight) * alpha


def murmur_hash32(seed: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
    """Return the 32-bit MurmurHash3 of seed, position and column, as SGLang's kernel for GPUs does.

    Args:
        seed: [T], 64 bits.
        positions: [T], 32 bits.
        columns: [V], 32 bits.

    Returns:
        int64 [T, V], below 2**32.
    """
    # In int64 products overflow, which does not change their lower 32 bits.
    seed, positions, columns = seed.long()[:, None], positions.long()[:, None], columns.long()[None]
    state = torch.zeros_like(seed)
    for part in (seed & _MASK, seed >> 32 & _MASK, positions & _MASK, columns & _MASK):
        mixed = _rotated(part * 0xCC9E2D51 & _MASK, 15) * 0x1B873593 & _MASK
        state = _rotated(state ^ mixed, 13) * 5 + 0xE6546B64 & _MASK
    state = state ^ 16
    state = (state ^ state >> 16) * 0x85EBCA6B & _MASK
    state = (state ^ state >> 13) * 0xC2B2AE35 & _MASK
    return state ^ state >> 16


def _rotated(word: Tensor, bits: int) -> Tensor:
    return (word << bits | word >> 32 - bits) & _MASK
