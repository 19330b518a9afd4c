"""The clipped objective of DAPO (arXiv 2503.14476, eq. 8) as a sum over tokens.

Nothing here divides: the reduction divides once, by the number of loss tokens of the mini-batch over all ranks.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from dapo_megatron.algo.kl import ESTIMATORS, k3
from dapo_megatron.types import TokenLoss


def dapo_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    loss_mask_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    weights_T: Tensor | None = None,
    ref_logprobs_T: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: Literal["k1", "k2", "k3"] = "k3",
) -> TokenLoss:
    """- sum over loss tokens of  weight * (min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) - kl_coef * KL).

    r is the probability ratio of a token, policy to old policy. On a kink (r = 1 + clip_high, say) the token counts as
    not clipped. Without `dual_clip`, r is unbounded where A < 0, as in the paper. Where anything of a loss token is not
    finite, the sum or a metric is not either, also where the clip hides it from the gradient.

    Args:
        logprobs_T: [T], nats; carries the gradient.
        old_logprobs_T: [T], nats: the policy at the start of the step.
        advantages_T: [T].
        loss_mask_T: bool [T]. The other slots may hold anything, also nan: they add 0 to value and gradient.
        dual_clip: bound r from above by this where A < 0 (arXiv 1912.09729). Not in the paper; its code has 10.
        weights_T: [T], see `algo.scope` and `algo.correction`; None is all 1.
        ref_logprobs_T: [T], nats: the frozen reference. Needed where kl_coef > 0; else only measured.

    Returns:
        The sum in the dtype of `logprobs_T`, its number of tokens, and as metrics clip_fraction_high,
        clip_fraction_low, dual_clip_fraction, ratio, ratio_max, kl_old (k3, old policy || policy) and, with a
        reference, kl_ref (policy || reference, by `kl_estimator`).
    """
    per_token = [old_logprobs_T, advantages_T, weights_T, ref_logprobs_T]
    _assert_shapes(logprobs_T, loss_mask_T, *per_token)
    assert kl_coef == 0 or ref_logprobs_T is not None, f"kl_coef = {kl_coef} needs the reference's log-probs"

    # Masked before any arithmetic: nan times 0 is nan, in the gradient too.
    new_T = _masked(logprobs_T, loss_mask_T)
    old_T = _masked(old_logprobs_T, loss_mask_T)
    advantages_T = _masked(advantages_T, loss_mask_T)
    log_ratio_T = new_T - old_T
    rises_T, falls_T = advantages_T > 0, advantages_T < 0

    # Clipped before exp, where a clipped ratio too large for its dtype still has gradient 0 rather than 0 * inf.
    highest_T = torch.full_like(log_ratio_T, math.inf).masked_fill_(~falls_T, math.log1p(clip_high))
    if dual_clip is not None:
        highest_T.masked_fill_(falls_T, math.log(dual_clip))
    lowest_T = torch.full_like(log_ratio_T, -math.inf).masked_fill_(falls_T, math.log1p(-clip_low))
    loss_T = -advantages_T * log_ratio_T.clamp(lowest_T, highest_T).exp()

    ratio_T = _masked(log_ratio_T.detach().exp(), loss_mask_T)
    too_high_T, too_low_T = log_ratio_T > highest_T, log_ratio_T < lowest_T
    metrics = {
        "clip_fraction_high": (rises_T & too_high_T).sum(),
        "clip_fraction_low": (falls_T & too_low_T).sum(),
        "dual_clip_fraction": (falls_T & too_high_T).sum(),
        "ratio": ratio_T.sum(),
        "ratio_max": ratio_T.amax(),
        "kl_old": k3(old_T, new_T.detach()).sum(),
    }
    if ref_logprobs_T is not None:
        kl_T = ESTIMATORS[kl_estimator](new_T, _masked(ref_logprobs_T, loss_mask_T))
        metrics["kl_ref"] = kl_T.detach().sum()
        if kl_coef:
            loss_T = loss_T + kl_coef * kl_T
    if weights_T is not None:
        loss_T = loss_T * _masked(weights_T, loss_mask_T)
    return TokenLoss(loss_T.sum(), loss_mask_T.sum(), metrics)


def _masked(values_T: Tensor, mask_T: Tensor) -> Tensor:
    return torch.where(mask_T, values_T, 0)


def _assert_shapes(logprobs_T: Tensor, loss_mask_T: Tensor, *others_T: Tensor | None) -> None:
    """All [T], T > 0, the mask bool."""
    shapes = [tuple(tensor.shape) for tensor in (logprobs_T, loss_mask_T, *others_T) if tensor is not None]
    assert len(shapes[0]) == 1 and shapes[0][0] > 0 and len(set(shapes)) == 1, (
        f"all must be [T] and alike, got {shapes}"
    )
    assert loss_mask_T.dtype == torch.bool, f"the mask must be bool, got {loss_mask_T.dtype}"
