"""Estimates KL(policy || reference), p and q below, from tokens that the policy sampled.

Source: J. Schulman, "Approximating KL Divergence", 2020.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def k2(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """Return (log p - log q)^2 / 2, nats [T]: biased, never negative; on samples of p its gradient is the KL's."""
    return (logprobs_T - ref_logprobs_T).square() / 2


def k3(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """Return q/p - 1 - log(q/p), nats [T]: unbiased and never negative; what GRPO uses (arXiv 2402.03300, eq. 4)."""
    log_ratio_T = ref_logprobs_T - logprobs_T
    return torch.expm1(log_ratio_T) - log_ratio_T


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k2": k2, "k3": k3}
