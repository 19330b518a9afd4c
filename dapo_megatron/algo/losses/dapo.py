"""The clipped objective of DAPO (arXiv 2503.14476, eq. 8); with clip_low = clip_high, that of PPO and GRPO.

The objective is min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), with r the probability ratio of a token, policy to
old policy. On a kink (r = 1 + clip_high, say) a token counts as not clipped. Without dual_clip, r is unbounded where
A < 0, as in the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from dapo_megatron.algo.clip import clip
from dapo_megatron.algo.loss import Loss, LossInput
from dapo_megatron.config.section import PositiveFloat, Section
from dapo_megatron.measures import Measures

if TYPE_CHECKING:
    from torch import Tensor


class Settings(Section):
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Ratios below 1 - clip_low give no gradient where the advantage is negative."""
    clip_high: PositiveFloat = 0.28
    """Ratios above 1 + clip_high give no gradient where the advantage is positive (clip-higher)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Floor the objective at dual_clip x advantage where the advantage is negative (arXiv 1912.09729). The
    paper has none, null; its code used 10."""


def per_token(given: LossInput, settings: Settings) -> tuple[Tensor, Measures]:
    advantages_T = given.advantages_T
    ratio_T, too_high_T, too_low_T = clip(
        given.log_ratio_T, advantages_T, low=settings.clip_low, high=settings.clip_high, dual=settings.dual_clip
    )
    measures = {
        "clip/high": given.share(too_high_T & (advantages_T > 0)),
        "clip/low": given.share(too_low_T),
        "clip/dual": given.share(too_high_T & (advantages_T < 0)),
    }
    return -advantages_T * ratio_T, measures


def reference(policy: Tensor, old: Tensor, advantage: float, settings: Settings) -> Tensor:
    ratio = (policy - old).exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    objective = (ratio * advantage).minimum(clipped * advantage)
    if settings.dual_clip is not None and advantage < 0:
        objective = objective.clamp(min=settings.dual_clip * advantage)
    return objective


LOSS = Loss(
    settings=Settings,
    per_token=per_token,
    meanings={
        "clip/high": "share of tokens whose ratio is above 1 + clip_high with a positive advantage",
        "clip/low": "share of tokens whose ratio is below 1 - clip_low with a negative advantage",
        "clip/dual": "share of tokens at the bound of dual_clip",
    },
    reference=reference,
    bounds=lambda settings: () if settings.dual_clip is None else (settings.dual_clip,),
)
