"""The section of what a response is worth."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from dapo_megatron.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section


class OverlongConfig(Section):
    punishment: bool = True
    """Soft overlong punishment: the reward falls linearly to -weight over the last `cache` tokens (paper, eq. 13)."""
    cache: PositiveInt = 4096
    """Tokens before the cap over which the punishment grows."""
    weight: NonNegativeFloat = 1.0
    """Punishment of a response that uses the whole cap."""
    filter: bool = False
    """Overlong filtering: tokens of truncated responses leave the loss, numerator and denominator alike."""


class RewardConfig(Section):
    rule: Literal["dapo", "lenient", "math_verify"] = "dapo"
    """How answers are judged: the published string rule, a forgiving one, or symbolic comparison."""
    right: float = 1.0
    """Reward of a right answer."""
    wrong: float = -1.0
    """Reward of a wrong answer, and of a response without one."""
    format: Literal["none", "r1"] = "none"
    """Extra reward for <think>...</think><answer>...</answer>, as in R1."""
    format_weight: NonNegativeFloat = 0.5
    """Reward that is added when the format is kept and subtracted when it is not."""
    truncated_is_wrong: bool = False
    """Grade a truncated response as wrong even where its answer is right. The published run did not."""
    overlong: OverlongConfig = OverlongConfig()
    """What becomes of responses near the cap."""
    workers: PositiveInt = 2
    """Processes that grade; one is killed and replaced when an answer takes too long."""
    timeout_seconds: PositiveFloat = 5.0
    """Wall-clock limit on grading one answer. Beyond it the answer counts as wrong."""

    @model_validator(mode="after")
    def _right_beats_wrong(self) -> RewardConfig:
        if self.right <= self.wrong:
            raise ValueError(f"right ({self.right}) must be more than wrong ({self.wrong})")
        return self
