"""Group Sequence Policy Optimization (arXiv 2507.18071, eq. 5 to 7).

The objective is min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) for every token of a response, where s is the
geometric mean of the probability ratios of all its loss tokens: whole responses are clipped or not. The paper averages
over responses (`algo.loss_scope=sample`); with scope token, long responses weigh more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from dapo_megatron.algo.clip import clip
from dapo_megatron.algo.loss import Loss, LossInput
from dapo_megatron.config.section import PositiveFloat, Section
from dapo_megatron.measures import Max, Measures

if TYPE_CHECKING:
    from torch import Tensor


class Settings(Section):
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 3e-4
    """Responses whose mean ratio is below 1 - clip_low give no gradient where the advantage is negative. The default
    is the paper's (section 5.1)."""
    clip_high: PositiveFloat = 4e-4
    """Responses whose mean ratio is above 1 + clip_high give no gradient where the advantage is positive. The default
    is the paper's."""


def per_token(given: LossInput, settings: Settings) -> tuple[Tensor, Measures]:
    log_ratio_T, advantages_T = given.sequence_means(given.log_ratio_T), given.advantages_T
    ratio_T, too_high_T, too_low_T = clip(log_ratio_T, advantages_T, low=settings.clip_low, high=settings.clip_high)
    measures = {
        "clip/high": given.share(too_high_T & (advantages_T > 0)),
        "clip/low": given.share(too_low_T),
        "ratio/sequence_max": Max((log_ratio_T.detach().exp() * given.mask_T).amax()),
    }
    return -advantages_T * ratio_T, measures


def reference(policy: Tensor, old: Tensor, advantage: float, settings: Settings) -> Tensor:
    ratio = (policy.sum() - old.sum()).div(len(policy)).exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return (ratio * advantage).minimum(clipped * advantage).expand(len(policy))


LOSS = Loss(
    settings=Settings,
    per_token=per_token,
    meanings={
        "clip/high": "share of tokens in responses whose mean ratio is above 1 + clip_high with a positive advantage",
        "clip/low": "share of tokens in responses whose mean ratio is below 1 - clip_low with a negative advantage",
        "ratio/sequence_max": "largest mean ratio of a response, policy to old policy",
    },
    reference=reference,
)
