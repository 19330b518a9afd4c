"""The loss of supervised training."""

from __future__ import annotations

import torch
from torch import Tensor

from dapo_megatron.types import TokenLoss


def likelihood_loss(logprobs_T: Tensor, loss_mask_T: Tensor, weights_T: Tensor | None = None) -> TokenLoss:
    """- sum over loss tokens of  weight * log-probability (nats), in the dtype of `logprobs_T` [T].

    Slots where `loss_mask_T` (bool [T]) is False add 0 to value and gradient, whatever they hold.
    """
    assert logprobs_T.ndim == 1 and logprobs_T.shape == loss_mask_T.shape, (logprobs_T.shape, loss_mask_T.shape)
    assert weights_T is None or weights_T.shape == logprobs_T.shape, (weights_T, logprobs_T.shape)
    loss_T = -torch.where(loss_mask_T, logprobs_T, 0)
    if weights_T is not None:
        loss_T = loss_T * torch.where(loss_mask_T, weights_T, 0)
    return TokenLoss(loss_T.sum(), loss_mask_T.sum())
