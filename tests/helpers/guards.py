"""The engines' processes that this process has started, apart from those that other tests need."""

from __future__ import annotations

import psutil


def guards() -> list[psutil.Process]:
    """The guard of every engine, oldest first."""
    found = [child for child in psutil.Process().children() if "dapo_megatron.rollout.guard" in child.cmdline()]
    return sorted(found, key=psutil.Process.create_time)
