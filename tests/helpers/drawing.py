"""A loss that draws random numbers, as one of a user's own may: its run goes on exactly only with their state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dapo_megatron.algo.loss import Loss, LossInput
from dapo_megatron.config.section import Section
from dapo_megatron.measures import Measures


class Settings(Section):
    noise: float = 0.1


def per_token(given: LossInput, settings: Any) -> tuple[Tensor, Measures]:
    noise_T = 1 + settings.noise * torch.randn_like(given.advantages_T)
    return -given.log_ratio_T.exp() * given.advantages_T * noise_T, {}


drawing = Loss(settings=Settings, per_token=per_token, meanings={})
