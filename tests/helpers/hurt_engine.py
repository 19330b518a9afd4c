"""A rank of a run whose engines are hurt: `SIGNAL PLACE INDEX... -- CONFIG ...`.

The processes of those engines get the signal, their guards as well: at PLACE `prompt:N` when an answer to the Nth
prompt is asked for, at `push:N` when the first bytes of version N are announced to an engine.
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


def hurt(number: signal.Signals, indices: Sequence[int]) -> None:
    """Send a signal to all processes of some engines, which start in the order of their numbers."""
    guards = [child for child in psutil.Process().children() if "dapo_megatron.rollout.guard" in child.cmdline()]
    guards.sort(key=psutil.Process.create_time)
    for index in indices:
        for process in (*guards[index].children(recursive=True), guards[index]):
            process.send_signal(number)


def hurt_in_a_push(number: signal.Signals, version: int, indices: Sequence[int]) -> None:
    from dapo_megatron.rollout.adapters.vllm import VllmEngine

    receive, first = VllmEngine.receive, itertools.count()

    @functools.wraps(receive)
    async def hurting(self: VllmEngine, info: dict[str, Any]) -> None:
        if self.version == version - 1 and next(first) == 0:
            hurt(number, indices)
        await receive(self, info)

    VllmEngine.receive = hurting


def hurt_at(number: signal.Signals, call: int, indices: Sequence[int]) -> None:
    from dapo_megatron.rollout.engines import Engines

    generate, calls = Engines.generate, itertools.count(1)

    @functools.wraps(generate)
    async def hurting(self: Engines, *args: Any) -> Any:
        if next(calls) == call:
            asyncio.get_running_loop().call_later(0.05, hurt, number, indices)
        return await generate(self, *args)

    setattr(Engines, "generate", hurting)  # noqa: B010


if __name__ == "__main__":
    from dapo_megatron.actor import topology
    from dapo_megatron.processes import leave

    topology.prepare()
    from dapo_megatron import rank

    end = sys.argv.index("--")
    place, _, count = sys.argv[2].partition(":")
    hurt_there = {"prompt": hurt_at, "push": hurt_in_a_push}[place]
    hurt_there(signal.Signals[sys.argv[1]], int(count), [int(index) for index in sys.argv[3:end]])
    leave(rank.main(sys.argv[end + 1 :]))
