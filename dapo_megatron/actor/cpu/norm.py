"""RMSNorm for the local layer spec. Megatron's own refuses sequence parallel without Apex or Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch


class RMSNorm(torch.nn.RMSNorm):
    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Each tensor-parallel rank normalises its own part of the sequence: Megatron sums the gradients of parameters
        # marked so.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
