"""Responses for tests, with texts where they matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_megatron.types import Completion, FinishReason, VersionSpan


def completion(
    token_ids: Sequence[int],
    logprobs: Sequence[float] | None = None,
    finish: FinishReason = FinishReason.STOP,
    versions: Sequence[VersionSpan] | None = None,
) -> Completion:
    """A response; log-probs are 0 and everything is by version 0 where nothing is said."""
    length = len(token_ids)
    return Completion(
        np.array(token_ids, np.int32),
        np.array([0.0] * length if logprobs is None else logprobs, np.float32),
        finish,
        tuple([VersionSpan(0, 0, length)] if versions is None else versions),
    )


def written(text: str, finish: FinishReason = FinishReason.STOP) -> Completion:
    """A response that `read` turns into `text`."""
    return completion([ord(character) for character in text], finish=finish)


def read(token_ids: NDArray[Any]) -> str:
    """Every token is the character of that number; 0, an end token, is none."""
    return "".join(chr(token) for token in token_ids if token)
