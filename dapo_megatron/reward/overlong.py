"""This module holds the soft overlong punishment."""

from __future__ import annotations


def soft_punishment(length: int, max_length: int, cache: int) -> float:
    """Return the reward for the length of a response, in [-1, 0] (DAPO, eq. 13).

    It is 0 up to max_length - cache tokens, falls linearly to -1 at max_length, and stays there.

    Args:
        length: generated tokens, the end token included.
        max_length: cap on generated tokens (L_max).
        cache: tokens before the cap over which the punishment grows (L_cache), at least 1.
    """
    over = length - (max_length - cache)
    return -min(max(over, 0), cache) / cache
