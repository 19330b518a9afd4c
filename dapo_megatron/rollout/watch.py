"""Notices an engine that hangs: its process is there, and nothing comes out of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NoReturn

from dapo_megatron.errors import EngineError
from dapo_megatron.rollout.engine import Engine, Progress
from dapo_megatron.rollout.server import Server

_PERIOD_SECONDS = 0.25
"""Between two looks at an engine."""
_LOOKS = 10
"""Looks at the least, one after the other, that find no new token before an engine counts as stalled."""
_SILENCES = 3
"""Questions in a row that stay unanswered before an engine counts as dead."""
_LATE_SECONDS = 0.5
"""By which a limit is noticed too late where something blocks the event loop: nobody reads an answer then."""


async def watch(
    engine: Engine,
    server: Server,
    stall_seconds: float,
    *,
    writing: Callable[[], bool],
    seen: Callable[[Progress], None],
) -> NoReturn:
    """Look at the progress of an engine over and over.

    Args:
        stall_seconds: how long it may go without a sign of life.
        writing: whether it has been asked for responses, so that tokens have to come.
        seen: is told the progress.

    Raises:
        EngineError: when it has died, does not answer for `stall_seconds`, or as long as it is `writing` has not a
            single new token within them.
    """
    period = min(_PERIOD_SECONDS, stall_seconds / _LOOKS)
    silences, idle_looks, last = 0, 0, None
    clock = asyncio.get_running_loop().time
    while True:
        began, limit = clock(), stall_seconds / _SILENCES
        try:
            async with asyncio.timeout(limit):
                progress = await engine.progress()
        except TimeoutError:
            if clock() - began > limit + _LATE_SECONDS:  # this process was busy, and has not looked for the answer
                continue
            silences += 1
            if silences == _SILENCES:
                raise _hangs(server, f"does not answer: {silences} questions in {stall_seconds:g} s") from None
            continue
        silences = 0
        seen(progress)
        idle_looks = idle_looks + 1 if writing() and progress == last else 0
        last = progress
        # Counted, not timed: where this process was stopped for a while, the engine may have been, too.
        if idle_looks * period >= stall_seconds:
            raise _hangs(server, f"answers, but has not written a single token for {stall_seconds:g} s")
        await asyncio.sleep(period)


def _hangs(server: Server, seen: str) -> EngineError:
    return EngineError(
        f"{server.name} {seen}; it hangs, or the machine is too busy: then raise engine.stall_seconds\n"
        f"{server.describe()}"
    )
