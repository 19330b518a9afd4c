"""Computes accuracy and its uncertainty from graded samples: [P, K], P problems with K samples each."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

RESAMPLES = 2000


def accuracy(correct_PK: Sequence[Sequence[bool]]) -> float:
    """Return avg@K: the mean over problems of the mean over samples."""
    return float(np.mean([np.mean(row) for row in correct_PK]))


def pass_at_k(correct_PK: Sequence[Sequence[bool]], k: int) -> float:
    """Return the chance that at least one of k samples is right, as a mean over problems.

    With c of n samples right, 1 - C(n-c, k) / C(n, k) is unbiased (Chen et al., 2021, arXiv 2107.03374, eq. 1).
    """
    chances = []
    for row in correct_PK:
        n, right = len(row), sum(row)
        if not 1 <= k <= n:
            raise ValueError(f"pass@k needs 1 <= k <= samples; got k={k} with {n} samples")
        chances.append(1 - comb(n - right, k) / comb(n, k))
    return float(np.mean(chances))


def majority(extracted_PK: Sequence[Sequence[str | None]], correct_PK: Sequence[Sequence[bool]]) -> float:
    """Return maj@K: the share of problems whose most frequent answer is right.

    Samples without an answer have no vote. Between answers that are equally frequent a coin is tossed: the problem
    counts as the share of them that is right. Without any answer it is wrong.
    """
    return float(np.mean([_vote(answers, grades) for answers, grades in zip(extracted_PK, correct_PK, strict=True)]))


def _vote(answers: Sequence[str | None], grades: Sequence[bool]) -> float:
    votes: dict[str, list[bool]] = {}
    for answer, right in zip(answers, grades, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(right)
    most = max(map(len, votes.values()), default=0)
    leaders = [rights for rights in votes.values() if len(rights) == most]
    return float(np.mean([np.mean(rights) for rights in leaders])) if leaders else 0.0


def standard_error(correct_PK: Sequence[Sequence[bool]]) -> float:
    """Return that of `accuracy`: unbiased standard deviation of the problems' means / sqrt(P); nan for one problem."""
    means_P = np.array([np.mean(row) for row in correct_PK])
    return float(means_P.std(ddof=1) / np.sqrt(len(means_P))) if len(means_P) > 1 else float("nan")


def bootstrap_interval(correct_PK: Sequence[Sequence[bool]], seed: int = 0) -> tuple[float, float]:
    """Return the 95% interval of `accuracy`: percentiles over resamples of the problems, each with all its samples."""
    means_P = np.array([np.mean(row) for row in correct_PK])
    rng = np.random.default_rng(seed)
    drawn = [means_P[rng.integers(len(means_P), size=len(means_P))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
