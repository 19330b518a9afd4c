"""Group-relative advantages (DAPO, arXiv 2503.14476, eq. 9)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def group_advantages(rewards_G: Tensor | Sequence[float], *, ddof: int | None = 1, eps: float = 1e-6) -> Tensor:
    """Return (R - mean R) / (std R + eps) for the responses to one prompt; all tokens of a response share it.

    The paper gives no eps and does not say which standard deviation; the defaults are those of its published code.
    Equal rewards give exactly 0. So does a group of one, which has nothing to be compared with; that code keeps its
    reward instead.

    Args:
        rewards_G: [G], floating; a sequence becomes float64.
        ddof: 1 divides by the unbiased standard deviation, 0 by the population's, None only centres.
        eps: added to the standard deviation, which keeps the division finite.

    Returns:
        [G], in the dtype of the rewards.
    """
    rewards_G = torch.as_tensor(rewards_G, dtype=None if isinstance(rewards_G, Tensor) else torch.float64)
    assert rewards_G.ndim == 1, f"rewards of one group must be [G], got {tuple(rewards_G.shape)}"
    assert rewards_G.is_floating_point(), f"rewards must be floating, got {rewards_G.dtype}"
    if bool((rewards_G == rewards_G[:1]).all()):  # rounding in the mean would leave 1e-17, which eps = 0 turns into 1
        return torch.zeros_like(rewards_G)
    centred_G = rewards_G - rewards_G.mean()
    if ddof is None:
        return centred_G
    return centred_G / (rewards_G.std(correction=ddof) + eps)
