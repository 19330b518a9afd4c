"""A rank of a run whose engines are hurt in the middle of a rollout: `SIGNAL CALL INDEX... -- CONFIG ...`.

The processes of those engines get the signal, their guards as well, when an answer to the CALLth prompt is asked for.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import signal
import sys
from collections.abc import Sequence
from typing import Any

import psutil


def hurt(number: signal.Signals, engines: Sequence[str]) -> None:
    for guard in psutil.Process().children():
        if "dapo_megatron.rollout.guard" not in guard.cmdline():
            continue
        family = [*guard.children(recursive=True), guard]
        if any(f"engine {index}" in engine_name(guard) for index in engines):
            for process in family:
                process.send_signal(number)


def engine_name(guard: psutil.Process) -> str:
    """Guards are children in the order of their engines."""
    guards = [child for child in psutil.Process().children() if "dapo_megatron.rollout.guard" in child.cmdline()]
    guards.sort(key=lambda child: child.create_time())
    return f"engine {guards.index(guard)}"


def hurt_at(number: signal.Signals, call: int, indices: Sequence[str]) -> None:
    from dapo_megatron.rollout.engines import Engines

    generate, calls = Engines.generate, itertools.count(1)

    @functools.wraps(generate)
    async def hurting(self: Engines, *args: Any) -> Any:
        if next(calls) == call:
            asyncio.get_running_loop().call_later(0.05, hurt, number, indices)
        return await generate(self, *args)

    Engines.generate = hurting


if __name__ == "__main__":
    from dapo_megatron.actor import topology
    from dapo_megatron.processes import leave

    topology.prepare()
    from dapo_megatron import rank

    end = sys.argv.index("--")
    hurt_at(signal.Signals[sys.argv[1]], int(sys.argv[2]), sys.argv[3:end])
    leave(rank.main(sys.argv[end + 1 :]))
