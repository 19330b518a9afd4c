from __future__ import annotations

import math

import pytest

from dapo_megatron.eval.statistics import accuracy, bootstrap_interval, majority, pass_at_k, standard_error

CORRECT = [[True, False, False, True], [False] * 4, [True] * 4]
"""Means 1/2, 0, 1."""


def test_accuracy() -> None:
    assert accuracy(CORRECT) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, 1 / 2),  # = accuracy
        (2, (1 - 1 / 6 + 0 + 1) / 3),  # 1 of the 6 pairs of the first problem is all wrong
        (3, 2 / 3),  # no triple of the first problem is
        (4, 2 / 3),
    ],
)
def test_pass_at_k(k: int, expected: float) -> None:
    assert pass_at_k(CORRECT, k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_wants_enough_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} with 4 samples"):
        pass_at_k(CORRECT, k)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["7", "7", "3"], [True, True, False], 1.0),
        (["7", "3", "3"], [True, False, False], 0.0),
        (["7", "3", None], [True, False, False], 0.5),  # a tie
        ([None, None, "7"], [False, False, True], 1.0),  # no answer, no vote
        ([None, None, None], [False, False, False], 0.0),
    ],
)
def test_majority(answers: list[str | None], correct: list[bool], expected: float) -> None:
    assert majority([answers], [correct]) == expected
    assert majority([answers, ["1", "1", "1"]], [correct, [True] * 3]) == (expected + 1) / 2


def test_standard_error() -> None:
    # Means 1/2, 0, 1: variance (0 + 1/4 + 1/4) / 2 = 1/4.
    assert standard_error(CORRECT) == pytest.approx(0.5 / math.sqrt(3))
    assert math.isnan(standard_error([[True, False]]))


def test_interval_of_many_problems_is_that_of_the_normal_distribution() -> None:
    correct = [[True, True]] * 300 + [[False, False]] * 700
    low, high = bootstrap_interval(correct)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - half, abs=0.003)
    assert high == pytest.approx(0.3 + half, abs=0.003)


def test_interval_is_over_problems_and_not_over_samples() -> None:
    # Every problem has the same mean, so another draw of problems changes nothing.
    assert bootstrap_interval([[True, False]] * 20) == (0.5, 0.5)


def test_interval_is_repeatable_and_depends_on_its_seed() -> None:
    correct = [[draw % 7 < right for draw in range(7)] for right in (0, 1, 1, 2, 3, 3, 4, 6, 7, 7)]
    assert bootstrap_interval(correct) == bootstrap_interval(correct)
    assert len({bootstrap_interval(correct, seed) for seed in range(8)}) > 1
