"""The engine samples from slightly other probabilities than the trainer computes: what to do about it.

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

from dapo_megatron.algo.segments import segment_sums, segments
from dapo_megatron.config import CorrectionConfig


def token_importance(old_logprobs_T: Tensor, rollout_logprobs_T: Tensor, loss_mask_T: Tensor) -> Tensor:
    """[T]: of each loss token by itself, 1 elsewhere. Log-probs [T] in nats; other slots may hold anything."""
    return _log_importance(old_logprobs_T, rollout_logprobs_T, loss_mask_T).exp()


def sequence_importance(
    old_logprobs_T: Tensor, rollout_logprobs_T: Tensor, loss_mask_T: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """[T]: of each response, the product over its loss tokens, at all its slots. inf where the dtype ends."""
    log_importance_T = _log_importance(old_logprobs_T, rollout_logprobs_T, loss_mask_T)
    return segment_sums(log_importance_T, cu_seqlens)[segments(cu_seqlens)].exp()


def truncated(importance_T: Tensor, cap: float) -> Tensor:
    """Weights [T]: min(importance, cap)."""
    return importance_T.clamp(max=cap)


def masked(importance_T: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Weights [T], importance inside [low, high] and 0 outside, and bool [T]: the tokens that stay in the loss."""
    stays_T = ~((importance_T < low) | (importance_T > high))
    return torch.where(stays_T, importance_T, 0), stays_T


def correct(
    old_logprobs_T: Tensor,
    rollout_logprobs_T: Tensor,
    loss_mask_T: Tensor,
    cu_seqlens: Tensor,
    config: CorrectionConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """The correction of `config` for one micro-batch: log-probs [T] in nats, segments `cu_seqlens`.

    Returns:
        The weight of each token [T], of no meaning where it is not in the loss; the new loss mask, bool [T]; and which
        loss tokens were truncated, or masked, bool [T].
    """
    if config.kind == "none":
        return torch.ones_like(old_logprobs_T), loss_mask_T, torch.zeros_like(loss_mask_T)
    if config.level == "token":
        importance_T = token_importance(old_logprobs_T, rollout_logprobs_T, loss_mask_T)
    else:
        importance_T = sequence_importance(old_logprobs_T, rollout_logprobs_T, loss_mask_T, cu_seqlens)
    if config.kind == "truncated":
        return truncated(importance_T, config.cap), loss_mask_T, loss_mask_T & (importance_T > config.cap)
    weights_T, stays_T = masked(importance_T, *config.band)
    return weights_T, loss_mask_T & stays_T, loss_mask_T & ~stays_T


def _log_importance(old_logprobs_T: Tensor, rollout_logprobs_T: Tensor, loss_mask_T: Tensor) -> Tensor:
    shapes = [tuple(tensor.shape) for tensor in (old_logprobs_T, rollout_logprobs_T, loss_mask_T)]
    assert len(shapes[0]) == 1 and len(set(shapes)) == 1, f"all must be [T] and alike, got {shapes}"
    assert loss_mask_T.dtype == torch.bool, f"the mask must be bool, got {loss_mask_T.dtype}"
    return torch.where(loss_mask_T, old_logprobs_T - rollout_logprobs_T, 0)
