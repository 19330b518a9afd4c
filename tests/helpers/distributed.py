"""Run a function on several ranks: real processes over gloo, a time limit, and errors one can read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dapo_megatron.check_reduction.pool import RankPool

POOL = RankPool()
"""Shared by all tests: to import torch and Megatron takes longer than most of them."""


def run_distributed(function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Calls `RankPool.run`. The function must leave its process as it found it, without a process group."""
    return POOL.run(ranks, function, *args, timeout=timeout)
