"""Run a function on several ranks: real processes over gloo, a time limit, and errors one can read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

from dapo_megatron.check_reduction.pool import RankPool


def run_distributed(function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """As `RankPool.run`, in processes of its own."""
    with closing(RankPool(ranks)) as pool:
        return pool.run(ranks, function, *args, timeout=timeout)
