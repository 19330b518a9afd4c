"""The clip of PPO with two sides of its own (DAPO, arXiv 2503.14476, eq. 8), on log-ratios of any level."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def clip(
    log_ratio_T: Tensor, advantages_T: Tensor, *, low: float, high: float, dual: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Clip ratios so that (clipped ratio) x A is min(r A, clip(r, 1 - low, 1 + high) A), at least dual x A where A < 0.

    Where the clip acts, the ratio has no gradient. On a kink (r = 1 + high, say) it does not act yet.

    Args:
        dual: upper bound of ratios where A < 0 (dual clip, arXiv 1912.09729); None for no bound, as in the paper.

    Returns:
        The clipped ratios [T]; and, bool [T], which were above an upper bound, and which below a lower one.
    """
    falls_T = advantages_T < 0
    highest_T = log_ratio_T.new_full(log_ratio_T.shape, math.inf).masked_fill_(~falls_T, math.log1p(high))
    if dual is not None:
        highest_T.masked_fill_(falls_T, math.log(dual))
    lowest_T = log_ratio_T.new_full(log_ratio_T.shape, -math.inf).masked_fill_(falls_T, math.log1p(-low))
    # Clipped before exp, where a clipped ratio too large for its dtype still has gradient 0 rather than 0 * inf.
    return log_ratio_T.clamp(lowest_T, highest_T).exp(), log_ratio_T > highest_T, log_ratio_T < lowest_T
