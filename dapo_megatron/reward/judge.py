"""The judge takes completions and gives back a graded group."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from dapo_megatron.config import RewardConfig
from dapo_megatron.reward.math import WINDOW
from dapo_megatron.reward.pool import GradingPool
from dapo_megatron.reward.shaping import is_correct, reward
from dapo_megatron.types import Completion, Decode, Group, Prompt

_CUT = 16
"""Characters at the start of a text whose first token is missing that may not be those of the whole text."""


class Judge:
    """Grades the responses to a prompt and shapes their rewards. Owns its grading processes; `close` ends them.

    Args:
        max_response_tokens: the cap on generated tokens, for the overlong punishment.
    """

    def __init__(self, config: RewardConfig, max_response_tokens: int, decode: Decode) -> None:
        self._config, self._max_response_tokens, self._decode = config, max_response_tokens, decode
        self._pool = GradingPool(config.rule, config.workers, config.timeout_seconds)

    async def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> Group:
        """Grade `completions`, in order. Their texts are made for that in a thread, and dropped.

        Raises:
            GradingError: where the grading processes cannot be started, or are closed.
        """
        texts = await asyncio.to_thread(lambda: [self._text(completion) for completion in completions])
        grades = await self._pool.grade([(text, prompt.answer) for text in texts])
        graded = list(zip(completions, texts, grades, strict=True))
        cap = self._max_response_tokens
        return Group(
            prompt=prompt,
            completions=tuple(completions),
            extracted=tuple(grade.extracted for grade in grades),
            correct=tuple(is_correct(completion, grade, self._config) for completion, _, grade in graded),
            rewards=tuple(reward(completion, text, grade, self._config, cap) for completion, text, grade in graded),
            timed_out=sum(grade.timed_out for grade in grades),
            truncated_right=sum(completion.truncated and grade.correct for completion, _, grade in graded),
        )

    def close(self) -> None:
        """End the grading processes. Safe to call twice."""
        self._pool.close()

    def _text(self, completion: Completion) -> str:
        if self._config.format == "r1":  # looks at how a response begins
            return self._decode(completion.token_ids)
        return text_end(completion, self._decode, WINDOW)


def text_end(completion: Completion, decode: Decode, characters: int) -> str:
    """Decode the response from far enough back that the last `characters` of its text are right."""
    tokens = characters // 2
    while tokens < completion.length:
        text = decode(completion.token_ids[-tokens:])
        # Cut bytes of a character become U+FFFD, and with them the bytes that follow in one go.
        if len(text.lstrip("\ufffd")) >= characters + _CUT:
            return text
        tokens *= 2
    return decode(completion.token_ids)
