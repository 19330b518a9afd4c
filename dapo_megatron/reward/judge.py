"""The judge takes completions and gives back a graded group."""

from __future__ import annotations

from collections.abc import Sequence

from dapo_megatron.config import RewardConfig
from dapo_megatron.reward.pool import GradingPool
from dapo_megatron.reward.shaping import is_correct, reward
from dapo_megatron.types import Completion, Group, Prompt


class Judge:
    """Grades the responses to a prompt and shapes their rewards. Owns its grading processes; `close` ends them.

    Args:
        max_response_tokens: the cap on generated tokens, for the overlong punishment.
    """

    def __init__(self, config: RewardConfig, max_response_tokens: int) -> None:
        self._config, self._max_response_tokens = config, max_response_tokens
        self._pool = GradingPool(config.rule, config.workers, config.timeout_seconds)

    async def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> Group:
        """Grade `completions`, in order.

        Raises:
            GradingError: where the grading processes cannot be started, or are closed.
        """
        grades = await self._pool.grade([(completion.text, prompt.answer) for completion in completions])
        graded = list(zip(completions, grades, strict=True))
        return Group(
            prompt=prompt,
            completions=tuple(completions),
            extracted=tuple(grade.extracted for grade in grades),
            correct=tuple(is_correct(completion, grade, self._config) for completion, grade in graded),
            rewards=tuple(
                reward(completion, grade, self._config, self._max_response_tokens) for completion, grade in graded
            ),
            timed_out=sum(grade.timed_out for grade in grades),
            truncated_right=sum(completion.truncated and grade.correct for completion, grade in graded),
        )

    def close(self) -> None:
        """End the grading processes. Safe to call twice."""
        self._pool.close()
