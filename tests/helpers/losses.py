"""A loss on tokens given by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dapo_megatron.algo.objective import Objective
from dapo_megatron.config import AlgoConfig
from dapo_megatron.types import MicroBatch, TokenLoss


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch_of(
    old_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    lengths: Sequence[int] | None = None,
    weights_T: Tensor | None = None,
    ref_T: Tensor | None = None,
) -> MicroBatch:
    """A micro-batch of which only what a loss looks at says anything; one sequence unless `lengths` has more."""
    slots = old_T.shape[0]
    nothing = torch.zeros(slots, dtype=torch.int64)
    lengths = [slots] if lengths is None else lengths
    return MicroBatch(
        tokens_T=nothing,
        labels_T=nothing,
        positions_T=nothing,
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        scored_T=mask_T,
        loss_mask_T=mask_T,
        advantages_T=advantages_T,
        weights_T=torch.ones_like(old_T) if weights_T is None else weights_T,
        rollout_logprobs_T=torch.zeros_like(old_T),
        groups_S=torch.zeros(len(lengths), dtype=torch.int64),
        old_logprobs_T=old_T,
        ref_logprobs_T=ref_T,
    )


def lose(logprobs_T: Tensor, batch: MicroBatch, **algo: Any) -> TokenLoss:
    """What the loss of this `algo` section makes of a micro-batch."""
    return Objective(AlgoConfig(**algo))(logprobs_T, batch)
