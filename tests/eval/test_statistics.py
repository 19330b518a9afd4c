from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from dapo_megatron.eval import statistics
from dapo_megatron.eval.statistics import (
    accuracy,
    bootstrap_interval,
    interval_of_mean,
    interval_over_both,
    interval_over_samples,
    majority,
    of_problems,
    paired,
    pass_at_k,
    powers,
    standard_error,
    t_quantile,
)

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


def test_every_metric_is_that_of_an_enumeration() -> None:
    """avg@k and pass@k as means over all ways to choose k of the samples, maj@k by counting votes."""
    rng = np.random.default_rng(1)
    drawn_PK = rng.integers(0, 5, size=(40, 6))
    answers = [[None if answer == 4 else str(answer) for answer in row] for row in drawn_PK.tolist()]
    correct = [[answer == "2" for answer in row] for row in answers]
    found = of_problems(answers, correct)
    assert list(found) == ["avg@6", "pass@1", "pass@2", "pass@4", "pass@6", "maj@6"]
    for place, (row, rights) in enumerate(zip(answers, correct, strict=True)):
        for k in powers(6):
            chosen = list(combinations(rights, k))
            averages, passes = (sum(map(sum, chosen)) / k, sum(map(any, chosen)))
            assert abs(found["avg@6"][place] - averages / len(chosen)) < 1e-12
            assert abs(found[f"pass@{k}"][place] - passes / len(chosen)) < 1e-12
        votes = Counter(answer for answer in row if answer is not None)
        leaders = [answer for answer, count in votes.items() if count == max(votes.values())]
        assert abs(found["maj@6"][place] - ("2" in leaders) / max(1, len(leaders))) < 1e-12
    assert abs(np.mean(found["avg@6"]) - accuracy(correct)) < 1e-12
    assert abs(np.mean(found["maj@6"]) - majority(answers, correct)) < 1e-12


@pytest.mark.parametrize(("freedom", "expected"), [(4, 2.776), (9, 2.262), (29, 2.045), (1000, 1.962)])
def test_t_quantiles_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, abs=0.002)


def test_intervals_cover_at_the_stated_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 500 evaluations with 30 problems out of a population, 8 samples each."""
    monkeypatch.setattr(statistics, "RESAMPLES", 600)
    rng = np.random.default_rng(5)
    population = rng.beta(0.6, 0.9, size=100_000)
    covered = Counter[str]()
    for _ in range(500):
        chances_P = rng.choice(population, size=30)
        correct = (rng.random((30, 8)) < chances_P[:, None]).tolist()
        over_samples = interval_over_samples(correct)
        assert over_samples
        for name, (low, high), truth in (
            ("problems", bootstrap_interval(correct), population.mean()),
            ("both", interval_over_both(correct), population.mean()),
            ("samples", over_samples, chances_P.mean()),
        ):
            covered[name] += low <= truth <= high
    assert {name: round(count / 500, 2) for name, count in covered.items()} == {
        "problems": pytest.approx(0.95, abs=0.02),
        "both": pytest.approx(0.97, abs=0.02),  # more than it says, as its docstring does
        "samples": pytest.approx(0.95, abs=0.02),
    }
    assert covered["both"] > covered["problems"]


def test_one_sample_says_nothing_of_the_noise_of_samples() -> None:
    assert interval_over_samples([[True], [False]]) is None
    assert interval_over_both([[True], [False], [True]]) == bootstrap_interval([[True], [False], [True]])


def test_intervals_do_not_depend_on_how_many_resamples_are_drawn_at_once() -> None:
    assert interval_of_mean([0.25] * 3) == (0.25, 0.25)
    low, high = interval_of_mean([0.0, 1.0] * 700)  # in parts of 714 resamples
    half = 1.96 * 0.5 / math.sqrt(1400)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.003)


def test_a_paired_difference_takes_out_what_problems_have_in_common() -> None:
    first = [float(place % 2) for place in range(40)]
    difference, interval = paired(first, [min(1.0, value + 0.25) for value in first])
    assert difference == pytest.approx(0.125)
    # Differences 0 and 1/4, half each: a deviation of 1/8 over 40 problems, not the 1/2 of the problems themselves.
    assert interval[1] - interval[0] == pytest.approx(2 * 2.02 * 0.125 / math.sqrt(39), rel=0.1)
    assert paired(first, first) == (0.0, (0.0, 0.0))
