"""The constraint of dynamic sampling (DAPO, arXiv 2503.14476, eq. 11)."""

from __future__ import annotations

from collections.abc import Sequence


def is_mixed(correct_G: Sequence[bool]) -> bool:
    """Return whether a group is neither all right nor all wrong: 0 < number of right responses < G.

    What counts is correctness before any shaping. A length penalty sets the rewards of an all-right group apart as
    well, but then the advantage would teach length and nothing else.
    """
    return 0 < sum(map(bool, correct_G)) < len(correct_G)
