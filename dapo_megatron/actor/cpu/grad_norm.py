"""Takes the norm of gradients on a GPU that has neither Transformer Engine nor Apex.

What Megatron falls back to then fetches the norm of every parameter by itself, and the host waits each time.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

_foreach: Any = torch
"""torch's own `_foreach_*` functions: on CUDA, a launch takes many tensors."""


def l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool, *args: Any
) -> tuple[Tensor, None]:
    """Return the norm of all tensors of the first list together, float32 [1], as `amp_C.multi_tensor_l2norm` does."""
    norms = torch.stack(_foreach._foreach_norm(tensor_lists[0], 2, dtype=torch.float64))
    return torch.linalg.vector_norm(norms).float()[None], None


def install() -> None:
    """Let Megatron take gradient norms by `l2_norm`, where nobody brought it a kernel for them."""
    clip_grads: Any = sys.modules["megatron.core.optimizer.clip_grads"]
    utils: Any = sys.modules["megatron.core.utils"]
    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm
