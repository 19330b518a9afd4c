"""CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5): policy gradient with a clipped, detached importance weight.

The objective is sg(clip(r, 1 - clip_low, 1 + clip_high)) A log p, with r the probability ratio of a token, policy to
old policy, and sg without gradient. No token ever loses its gradient, which a clipped objective takes from just those
rare tokens that turn a chain of thought. The value of this loss says nothing; its gradient is the point.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from dapo_megatron.algo.loss import Loss, LossInput
from dapo_megatron.config.section import PositiveFloat, Section
from dapo_megatron.measures import Measures

if TYPE_CHECKING:
    from torch import Tensor


class Settings(Section):
    clip_low: Annotated[float, Field(gt=0, lt=1)] | None = None
    """A token weighs at least 1 - clip_low. The paper has no lower bound: null."""
    clip_high: PositiveFloat = 4.0
    """A token weighs at most 1 + clip_high. The paper gives no value; this caps the weight at 5."""


def per_token(given: LossInput, settings: Settings) -> tuple[Tensor, Measures]:
    log_ratio_T = given.log_ratio_T.detach()
    lowest = -math.inf if settings.clip_low is None else math.log1p(-settings.clip_low)
    highest = math.log1p(settings.clip_high)
    measures = {
        "clip/high": given.share(log_ratio_T > highest),
        "clip/low": given.share(log_ratio_T < lowest),
    }
    return -log_ratio_T.clamp(lowest, highest).exp() * given.advantages_T * given.logprobs_T, measures


def reference(policy: Tensor, old: Tensor, advantage: float, settings: Settings) -> Tensor:
    ratio = (policy - old).exp().detach()
    low = 0.0 if settings.clip_low is None else 1 - settings.clip_low
    return ratio.clamp(low, 1 + settings.clip_high) * advantage * policy


LOSS = Loss(
    settings=Settings,
    per_token=per_token,
    meanings={
        "clip/high": "share of tokens whose weight is held at 1 + clip_high",
        "clip/low": "share of tokens whose weight is held at 1 - clip_low",
    },
    reference=reference,
    bounds=lambda settings: (1 + settings.clip_high,),
)
