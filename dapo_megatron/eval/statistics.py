"""Computes accuracy and its uncertainty from graded samples: [P, K], P problems with K samples each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Of lengths."""

_AT_ONCE = 1_000_000
"""Numbers that are drawn at once: they bound memory, and belong to what a seed decides."""

Interval = tuple[float, float]
_Draw = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]
"""Draws rows of problems' means: [rows, P]."""


def accuracy(correct_PK: Sequence[Sequence[bool]]) -> float:
    """Return avg@K: the mean over problems of the mean over samples."""
    return float(np.mean(_means(correct_PK)))


def pass_at_k(correct_PK: Sequence[Sequence[bool]], k: int) -> float:
    """Return the chance that at least one of k samples is right, as a mean over problems.

    With c of n samples right, 1 - C(n-c, k) / C(n, k) is unbiased (Chen et al., 2021, arXiv 2107.03374, eq. 1).
    """
    return float(np.mean(_pass_chances(correct_PK, k)))


def powers(samples: int) -> list[int]:
    """Return the k for which pass@k is told: 1, 2, 4, ..., and `samples`.

    >>> powers(12)
    [1, 2, 4, 8, 12]
    """
    return sorted({*(2**power for power in range(samples.bit_length())), samples})


def majority(extracted_PK: Sequence[Sequence[str | None]], correct_PK: Sequence[Sequence[bool]]) -> float:
    """Return maj@K: the share of problems whose most frequent answer is right.

    Samples without an answer have no vote. Between answers that are equally frequent a coin is tossed: the problem
    counts as the share of them that is right. Without any answer it is wrong.
    """
    return float(np.mean(_votes(extracted_PK, correct_PK)))


def _pass_chances(correct_PK: Sequence[Sequence[bool]], k: int) -> list[float]:
    chances = []
    for row in correct_PK:
        n, right = len(row), sum(row)
        if not 1 <= k <= n:
            raise ValueError(f"pass@k needs 1 <= k <= samples; got k={k} with {n} samples")
        chances.append(1 - comb(n - right, k) / comb(n, k))
    return chances


def _votes(extracted_PK: Sequence[Sequence[str | None]], correct_PK: Sequence[Sequence[bool]]) -> list[float]:
    return [_vote(answers, grades) for answers, grades in zip(extracted_PK, correct_PK, strict=True)]


def _vote(answers: Sequence[str | None], grades: Sequence[bool]) -> float:
    votes: dict[str, list[bool]] = {}
    for answer, right in zip(answers, grades, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(right)
    most = max(map(len, votes.values()), default=0)
    leaders = [rights for rights in votes.values() if len(rights) == most]
    return float(np.mean([np.mean(rights) for rights in leaders])) if leaders else 0.0


def of_problems(
    extracted_PK: Sequence[Sequence[str | None]], correct_PK: Sequence[Sequence[bool]]
) -> dict[str, list[float]]:
    """Return what each problem adds to avg@K, pass@k for the k of `powers`, and maj@K, by these names: [P] each.

    >>> of_problems([["7", "3"], [None, None]], [[True, False], [False, False]])
    {'avg@2': [0.5, 0.0], 'pass@1': [0.5, 0.0], 'pass@2': [1.0, 0.0], 'maj@2': [0.5, 0.0]}
    """
    samples = len(correct_PK[0])
    return {
        f"avg@{samples}": [float(mean) for mean in _means(correct_PK)],
        **{f"pass@{k}": _pass_chances(correct_PK, k) for k in powers(samples)},
        f"maj@{samples}": _votes(extracted_PK, correct_PK),
    }


def standard_error(correct_PK: Sequence[Sequence[bool]]) -> float:
    """Return that of `accuracy`: unbiased standard deviation of the problems' means / sqrt(P); nan for one problem."""
    means_P = _means(correct_PK)
    return float(means_P.std(ddof=1) / np.sqrt(len(means_P))) if len(means_P) > 1 else float("nan")


def bootstrap_interval(correct_PK: Sequence[Sequence[bool]], seed: int = 0) -> Interval:
    """Return the 95% interval of `accuracy` over problems: resamples of them, each with all its samples.

    It covers the accuracy on all problems of the kind that these are a sample of. What the samples' noise adds is in
    the spread of the problems' means.
    """
    return interval_of_mean([float(mean) for mean in _means(correct_PK)], seed)


def interval_of_mean(values_P: Sequence[float], seed: int = 0) -> Interval:
    """Return the 95% bootstrap interval of the mean of what problems have each, over problems."""
    means_P = np.array(values_P)
    return _expanded(lambda rng, shape: means_P[rng.integers(len(means_P), size=shape)], len(means_P), seed)


def interval_over_both(correct_PK: Sequence[Sequence[bool]], seed: int = 0) -> Interval:
    """Return the 95% interval of `accuracy` at two levels: resamples of the problems, and of the samples of each.

    It covers what `bootstrap_interval` does, and more often than it says: the spread of the problems' means has the
    noise of their samples already, which the second level adds once more. With many samples the two are alike.
    """
    means_P, samples = _means(correct_PK), len(correct_PK[0])

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
        # Right among K samples that are drawn anew, with replacement, from K of which a share is right.
        return rng.binomial(samples, means_P[rng.integers(len(means_P), size=shape)]) / samples

    return _expanded(draw, len(means_P), seed)


def interval_over_samples(correct_PK: Sequence[Sequence[bool]], seed: int = 0) -> Interval | None:
    """Return the 95% interval of `accuracy` over samples, on these problems: resamples of the samples of each.

    It covers what the same model has on the same problems with endlessly many samples: the noise of another seed. None
    where a problem has one sample, which says nothing of that.
    """
    means_P, samples = _means(correct_PK), len(correct_PK[0])
    if samples == 1:
        return None
    drawn = _resampled(lambda rng, shape: rng.binomial(samples, means_P, shape) / samples, len(means_P), seed)
    # The variance among K resampled ones is (K-1)/K of that which they estimate.
    wider = means_P.mean() + (drawn - means_P.mean()) * sqrt(samples / (samples - 1))
    low, high = np.clip(np.quantile(wider, [0.025, 0.975]), 0.0, 1.0)
    return float(low), float(high)


def paired(first_P: Sequence[float], second_P: Sequence[float], seed: int = 0) -> tuple[float, Interval]:
    """Return second - first as a mean over problems, and its 95% bootstrap interval: the same problems for both."""
    differences_P = [two - one for one, two in zip(first_P, second_P, strict=True)]
    return float(np.mean(differences_P)), interval_of_mean(differences_P, seed)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return quantile -> value, for `QUANTILES`.

    >>> quantiles([1, 2, 3, 4, 5])["0.5"]
    3.0
    """
    return {str(share): float(value) for share, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}


def _means(correct_PK: Sequence[Sequence[bool]]) -> NDArray[np.float64]:
    return np.array([np.mean(row) for row in correct_PK], np.float64)


def _expanded(draw: _Draw, problems: int, seed: int) -> Interval:
    """Return 95% percentiles of what is drawn, expanded for few problems (Hesterberg, 2015, arXiv 1411.5279).

    Percentiles alone are too narrow by sqrt((P-1)/P), and take the normal's quantile where the t distribution's
    belongs: with 30 problems they cover some 93%.
    """
    drawn = _resampled(draw, problems, seed)
    if problems == 1:
        return float(np.min(drawn)), float(np.max(drawn))
    tail = NormalDist().cdf(-sqrt(problems / (problems - 1)) * t_quantile(problems - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def _resampled(draw: _Draw, problems: int, seed: int) -> NDArray[np.float64]:
    """Return the means of `RESAMPLES` rows that are drawn, some at a time."""
    rng = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // problems)
    sizes = (min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows))
    return np.concatenate([draw(rng, (size, problems)).mean(axis=1) for size in sizes])


def t_quantile(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t (Abramowitz and Stegun, 26.7.5), to 0.002 from 4 degrees of freedom on.

    >>> round(t_quantile(29), 3)
    2.045
    """
    z = NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92_160 * freedom**4)
    )
