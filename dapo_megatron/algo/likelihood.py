"""The loss of supervised training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dapo_megatron.types import MicroBatch, TokenLoss


def likelihood(logprobs_T: Tensor, batch: MicroBatch, *_: Any) -> TokenLoss:
    """- sum over loss tokens of  weight * log-probability (nats), in the dtype of `logprobs_T` [T].

    Slots outside the loss add 0 to value and gradient, whatever they hold.
    """
    mask_T = batch.loss_mask_T
    assert logprobs_T.ndim == 1 and logprobs_T.shape == mask_T.shape, (logprobs_T.shape, mask_T.shape)
    loss_T = -torch.where(mask_T, logprobs_T, 0) * torch.where(mask_T, batch.weights_T, 0)
    return TokenLoss(loss_T.sum(), mask_T.sum())
