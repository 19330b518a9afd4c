"""Corrects for the engine, which samples from slightly other probabilities than the trainer computes.

importance = probability under the trainer's old policy / probability under the engine. Sources:

- truncated, token: F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025
  (TIS).
- truncated and masked, sequence: J. Liu et al., "When Speed Kills Stability: Demystifying RL Collapse from the
  Training-Inference Mismatch", 2025 (sequence-level TIS and MIS).
- masked, token: Ling Team, "Small Leak Can Sink a Great Ship: Boost RL Training on MoE with IcePop", 2025;
  arXiv 2510.18855.

Departures: IcePop and MIS set the weight of a masked token to 0 and go on dividing by all tokens; here masked tokens
leave the denominator, too. MIS has no lower end; here both levels have the same band. The weights multiply the whole
loss of a token, its KL term included, which then estimates the KL under the trainer's policy.

All functions work in the dtype of the log-probs. nan stays nan, and in the loss: a broken log-prob must not pass for a
token that was masked on purpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dapo_megatron.algo.segments import check_slots, segment_sums, segments
from dapo_megatron.config import CorrectionConfig


def importance(
    old_logprobs_T: Tensor, rollout_logprobs_T: Tensor, loss_mask_T: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Return the importance of each loss token, [T], 1 elsewhere; with `cu_seqlens`, that of whole responses.

    A response has the product over its loss tokens, at all its slots; inf where the dtype ends.

    Args:
        old_logprobs_T: [T], nats, like `rollout_logprobs_T`; slots outside the loss may hold anything.
        loss_mask_T: bool [T].
    """
    check_slots(loss_mask_T, old_logprobs_T, rollout_logprobs_T)
    log_importance_T = torch.where(loss_mask_T, old_logprobs_T - rollout_logprobs_T, 0)
    if cu_seqlens is not None:
        log_importance_T = segment_sums(log_importance_T, cu_seqlens)[segments(cu_seqlens)]
    return log_importance_T.exp()


def correct(
    old_logprobs_T: Tensor,
    rollout_logprobs_T: Tensor,
    loss_mask_T: Tensor,
    cu_seqlens: Tensor,
    config: CorrectionConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the correction of `config` to one micro-batch; log-probs [T] in nats.

    Returns:
        The weight of each token [T], of no meaning where it is not in the loss; the new loss mask, bool [T]; and which
        loss tokens were truncated, or masked, bool [T].
    """
    if config.kind == "none":
        return torch.ones_like(old_logprobs_T), loss_mask_T, torch.zeros_like(loss_mask_T)
    bounds = cu_seqlens if config.level == "sequence" else None
    importance_T = importance(old_logprobs_T, rollout_logprobs_T, loss_mask_T, bounds)
    if config.kind == "truncated":
        return importance_T.clamp(max=config.cap), loss_mask_T, loss_mask_T & (importance_T > config.cap)
    low, high = config.band
    outside_T = (importance_T < low) | (importance_T > high)  # nan is not
    return torch.where(outside_T, 0, importance_T), loss_mask_T & ~outside_T, loss_mask_T & outside_T
