from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from dapo_megatron.rollout.answer import decode, encode
from dapo_megatron.types import Completion, FinishReason, VersionSpan
from tests.helpers.completions import completion

RESPONSES = [
    completion([7, 0, 2**31 - 1], [-0.5, -1e-30, -np.inf], versions=[VersionSpan(3, 0, 1), VersionSpan(2**40, 1, 3)]),
    completion([], finish=FinishReason.ABORT),
    completion([2]),
    replace(completion([5, 6], finish=FinishReason.LENGTH), versions=(), cached_tokens=2**40),
]


def plain(completion: Completion) -> tuple[Any, ...]:
    return (
        *(completion.token_ids.tolist(), completion.logprobs.tolist()),
        *(completion.finish, completion.versions, completion.cached_tokens),
    )


@pytest.mark.parametrize("count", [1, 2, 4])
def test_responses_come_back_as_they_were(count: int) -> None:
    read = decode(encode(RESPONSES[:count]))
    assert [plain(completion) for completion in read] == [plain(completion) for completion in RESPONSES[:count]]


def test_a_token_takes_eight_bytes() -> None:
    assert len(encode([completion(range(1000))] * 16)) < 16 * 1000 * 8 + 16 * 64 + 500


def changed(**changes: np.ndarray) -> bytes:
    return save(load(encode(RESPONSES)) | changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "HeaderTooSmall|header"),
        (b"<html>", "HeaderTooSmall|header"),
        (struct.pack("<Q", 2**60) + b"{", "HeaderTooLarge|header"),
        (encode(RESPONSES)[:-1], ""),
        (save({"token_ids": np.zeros(1, np.int32)}), "lengths"),
        (changed(lengths=np.array([3, 0, 1, 1])), "6 tokens in responses of 5 together"),
        (changed(logprobs=np.zeros(7, np.float32)), r"token_ids \(2,\) and logprobs \(3,\)"),
        (changed(logprobs=np.zeros(6, np.float64)), "logprobs float64"),
        (changed(finish=np.array([0, 0, 0, 9], np.uint8)), "range"),
        (changed(finish=np.array([0, 0, 0], np.uint8)), "zip"),
        (changed(cached=np.zeros(3, np.int64)), "zip"),
        (changed(versions=np.array([[4, 0, 0, 1]])), "range"),
        (changed(versions=np.array([[0, 0, 0]])), "positional|missing"),
    ],
)
def test_anything_else_is_refused(content: bytes, message: str) -> None:
    with pytest.raises((ValueError, LookupError, TypeError), match=message):
        decode(content)
