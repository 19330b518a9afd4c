"""Applies the rotary embedding to packed sequences, with angles looked up once per micro-batch.

Megatron's version without the fused CUDA kernel slices the angles sequence by sequence and takes sine and cosine again
in every layer, for queries and for keys, which takes about twice as long.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dapo_megatron.actor.cpu.packing import plan_of

_angles: WeakIdKeyDictionary = WeakIdKeyDictionary()


def install() -> None:
    """Replace the function that Megatron calls for THD input without a fused kernel."""
    rope_utils: Any = sys.modules["megatron.core.models.common.embeddings.rope_utils"]
    rope_utils._apply_rotary_pos_emb_thd = apply_packed


def apply_packed(
    t: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Turn t [t, h, d] of this rank by its positions.

    Args:
        cu_seqlens: int32 [S+1] of the whole context-parallel group.
        freqs: float32 [longest, 1, 1, d], the angles of each position, the two halves of d alike.
    """
    if rotary_interleaved or multi_latent_attention or cp_group is None or freqs.shape[-1] != t.shape[-1]:
        raise NotImplementedError("packed rotary embedding on CPU: only the non-interleaved form over whole heads")
    cached = _angles.get(cu_seqlens)
    if cached is None or cached[0] is not freqs or cached[1].dtype != t.dtype:
        angles = freqs[plan_of(cu_seqlens, cp_group.size(), cp_group.rank()).positions_t, 0]
        half = angles.shape[-1] // 2
        cos, sin = angles.cos() * mscale, angles.sin() * mscale
        # rotate_half(t) * sin written as a half-turn of t times a signed sine: one pass less over t.
        signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        cached = _angles[cu_seqlens] = (freqs, cos.to(t.dtype), signed.to(t.dtype))
    _, cos, signed_sin = cached
    return torch.addcmul(t * cos, t.roll(t.shape[-1] // 2, dims=-1), signed_sin)
