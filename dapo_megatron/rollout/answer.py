"""Responses on their way from an engine to the trainer: arrays in safetensors, 8 bytes a token, nothing per token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dapo_megatron.types import Completion, FinishReason, VersionSpan

GENERATE = "/dapo_megatron/generate"
PROGRESS = "/dapo_megatron/progress"
ABOUT = "/dapo_megatron/about"
LEASE = "/dapo_megatron/lease"
HEALTH = "/health"
"""Paths of our endpoints."""

_FINISH = list(FinishReason)


def encode(completions: Sequence[Completion]) -> bytes:
    """Lay the responses to one prompt, at least one, end to end.

    `token_ids` int32 [T] and `logprobs` float32 [T] hold all tokens, `lengths` int64 [G] says where they are parted,
    `finish` uint8 [G] counts the members of `FinishReason`, `cached` int64 [G] has the tokens of the prompt that were
    cached, and a row of `versions` int64 [S, 4] is response, version, start and end of a span.
    """
    spans = [(index, s.version, s.start, s.end) for index, c in enumerate(completions) for s in c.versions]
    return save(
        {
            "token_ids": np.concatenate([completion.token_ids for completion in completions]),
            "logprobs": np.concatenate([completion.logprobs for completion in completions]),
            "lengths": np.array([completion.length for completion in completions], np.int64),
            "finish": np.array([_FINISH.index(completion.finish) for completion in completions], np.uint8),
            "cached": np.array([completion.cached_tokens for completion in completions], np.int64),
            "versions": np.array(spans, np.int64).reshape(-1, 4),
        }
    )


def decode(content: bytes) -> list[Completion]:
    """Read what `encode` wrote. The arrays of the responses are views of two, which live as long as any of them.

    Raises:
        ValueError, LookupError: for anything else.
    """
    try:
        arrays = load(content)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    lengths = arrays["lengths"]
    if (total := int(lengths.sum())) != len(arrays["token_ids"]):
        raise ValueError(f"{len(arrays['token_ids'])} tokens in responses of {total} together")
    starts = np.cumsum(lengths)[:-1]
    tokens, logprobs = np.split(arrays["token_ids"], starts), np.split(arrays["logprobs"], starts)
    spans: list[list[VersionSpan]] = [[] for _ in tokens]
    for index, *span in arrays["versions"].tolist():
        spans[index].append(VersionSpan(*span))
    finish = [_FINISH[index] for index in arrays["finish"].tolist()]
    return [
        Completion(token_ids, values, reason, tuple(own), cached)
        for token_ids, values, reason, own, cached in zip(
            tokens, logprobs, finish, spans, arrays["cached"].tolist(), strict=True
        )
    ]
