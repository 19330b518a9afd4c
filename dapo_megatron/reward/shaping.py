"""This module turns a grade into the reward that the advantage is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dapo_megatron.config import RewardConfig
from dapo_megatron.reward.format import keeps_r1_format
from dapo_megatron.reward.math import Grade
from dapo_megatron.reward.overlong import soft_punishment

if TYPE_CHECKING:
    from dapo_megatron.types import Completion


def is_correct(completion: Completion, grade: Grade, config: RewardConfig) -> bool:
    """Tell right from wrong before any shaping, as dynamic sampling sees it."""
    return grade.correct and not (config.truncated_is_wrong and completion.truncated)


def reward(completion: Completion, text: str, grade: Grade, config: RewardConfig, max_response_tokens: int) -> float:
    """Add up accuracy, format and soft overlong punishment, as far as `config` asks for them.

    The sum lies in [-2, 1] with the defaults.

    Args:
        text: the decoded completion, of which only the format reward reads anything.
        max_response_tokens: the cap that the response was sampled under.
    """
    total = config.right if is_correct(completion, grade, config) else config.wrong
    if config.format == "r1":
        total += config.format_weight if keeps_r1_format(text) else -config.format_weight
    if config.overlong.punishment:
        punishment = soft_punishment(completion.length, max_response_tokens, config.overlong.cache)
        total += config.overlong.weight * punishment
    return total
