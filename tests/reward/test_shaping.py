import pytest

from dapo_megatron.config import OverlongConfig, RewardConfig
from dapo_megatron.reward.math import Grade
from dapo_megatron.reward.shaping import is_correct, reward
from dapo_megatron.types import Completion, FinishReason
from tests.helpers.completions import completion as make

RIGHT, WRONG = Grade(True, "34"), Grade(False, "35")
TIDY = "<think>a</think><answer>34</answer>"


def completion(length: int, finish: FinishReason = FinishReason.STOP) -> Completion:
    return make([1] * length, finish=finish)


@pytest.mark.parametrize(
    ("length", "grade", "expected"),
    [(4, RIGHT, 1.0), (4, WRONG, -1.0), (6, RIGHT, 0.5), (6, WRONG, -1.5), (8, RIGHT, 0.0), (8, WRONG, -2.0)],
)
def test_accuracy_plus_punishment(length, grade, expected):
    config = RewardConfig(overlong=OverlongConfig(cache=4))
    assert reward(completion(length), "", grade, config, max_response_tokens=8) == expected


def test_punishment_has_a_weight_and_a_switch():
    heavy = RewardConfig(overlong=OverlongConfig(cache=4, weight=2.0))
    off = RewardConfig(overlong=OverlongConfig(cache=4, punishment=False))
    assert reward(completion(6), "", RIGHT, heavy, max_response_tokens=8) == 0.0
    assert reward(completion(8), "", RIGHT, off, max_response_tokens=8) == 1.0


@pytest.mark.parametrize(("text", "expected"), [(TIDY, 0.75 + 0.25), ("34", 0.75 - 0.25)])
def test_format_is_added_or_subtracted(text, expected):
    config = RewardConfig(right=0.75, wrong=0.0, format="r1", format_weight=0.25)
    assert reward(completion(4), text, RIGHT, config, max_response_tokens=20480) == expected


def test_a_truncated_answer_counts_unless_told_otherwise():
    truncated = completion(8, FinishReason.LENGTH)
    published, strict = (
        RewardConfig(truncated_is_wrong=strict, overlong=OverlongConfig(cache=4)) for strict in (False, True)
    )
    assert is_correct(truncated, RIGHT, published)
    assert reward(truncated, "", RIGHT, published, max_response_tokens=8) == 0.0
    assert not is_correct(truncated, RIGHT, strict)
    assert reward(truncated, "", RIGHT, strict, max_response_tokens=8) == -2.0
    assert is_correct(completion(8), RIGHT, strict)
    assert not is_correct(completion(8), WRONG, strict)
