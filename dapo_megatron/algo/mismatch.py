"""Measures how far the engine's log-probs are from the trainer's for the same tokens and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from dapo_megatron.algo.kl import k3
from dapo_megatron.algo.segments import check_slots
from dapo_megatron.measures import Max, Mean, Measures


def mismatch(trainer_logprobs_T: Tensor, rollout_logprobs_T: Tensor, loss_mask_T: Tensor) -> Measures:
    """Measure the tokens of `loss_mask_T` (bool [T]); log-probs [T] in nats. Everything is detached.

    Returns:
        mismatch/kl: mean of k3 of KL(engine || trainer), which the engine's samples estimate without bias;
        mismatch/abs: mean of |difference|; mismatch/abs_max: the largest |difference|, 0 where there are no tokens.
    """
    check_slots(loss_mask_T, trainer_logprobs_T, rollout_logprobs_T)
    trainer_T = torch.where(loss_mask_T, trainer_logprobs_T.detach(), 0)
    rollout_T = torch.where(loss_mask_T, rollout_logprobs_T, 0)
    difference_T, tokens = (trainer_T - rollout_T).abs(), loss_mask_T.sum()
    return {
        "mismatch/kl": Mean(k3(rollout_T, trainer_T).sum(), tokens),
        "mismatch/abs": Mean(difference_T.sum(), tokens),
        "mismatch/abs_max": Max(difference_T.amax()),
    }
