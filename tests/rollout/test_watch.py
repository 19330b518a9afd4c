"""Engines that hang in one way or another, and what is said of them."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dapo_megatron.errors import EngineError
from dapo_megatron.rollout.engine import Progress
from dapo_megatron.rollout.server import StartedServer
from dapo_megatron.rollout.watch import watch

STALL_SECONDS = 0.6


class Engine:
    """Answers what `answer` says for the number of the question; it is silent where that is None."""

    def __init__(self, answer: Callable[[int], Progress | None]) -> None:
        self.answer, self.asked = answer, 0

    async def progress(self) -> Progress:
        self.asked += 1
        progress = self.answer(self.asked)
        if progress is None:
            await asyncio.sleep(3600)
        assert progress
        return progress


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StartedServer]:
    code = "import time; print('last words', flush=True); time.sleep(100)"
    server = StartedServer("engine 3", [sys.executable, "-c", code], os.environ, tmp_path / "log", lambda: True)
    while not (tmp_path / "log").stat().st_size:
        time.sleep(0.01)
    yield server
    server.close()


def outcome(server: StartedServer, engine: Any, seconds: float, writing: bool = True) -> tuple[str | None, float]:
    """What the watch says of the engine within `seconds`, and when."""

    async def main() -> None:
        async with asyncio.timeout(seconds):
            await watch(engine, server, STALL_SECONDS, writing=lambda: writing, seen=lambda progress: None)

    started = time.monotonic()
    try:
        asyncio.run(main())
    except EngineError as error:
        return str(error), time.monotonic() - started
    except TimeoutError:
        return None, seconds
    raise AssertionError("a watch has no end")


def test_an_engine_that_answers_nothing(server: StartedServer) -> None:
    said, seconds = outcome(server, Engine(lambda asked: None), 5)
    assert said and said.startswith("engine 3 does not answer: 3 questions in 0.6 s; it hangs")
    assert "engine.stall_seconds" in said and "has not ended" in said and "last words" in said
    assert STALL_SECONDS <= seconds < 2 * STALL_SECONDS


def test_an_engine_that_answers_and_writes_nothing(server: StartedServer) -> None:
    said, seconds = outcome(server, Engine(lambda asked: Progress(5, 1)), 5)
    assert said and "engine 3 answers, but has not written a single token for 0.6 s" in said
    assert STALL_SECONDS <= seconds < 2 * STALL_SECONDS


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda asked: Progress(asked, 0), id="a token at a time"),
        pytest.param(lambda asked: Progress(asked // 5, 0), id="slowly"),
        pytest.param(lambda asked: Progress(7, asked % 2), id="as many tokens end as begin"),
        pytest.param(lambda asked: None if asked % 3 else Progress(asked, 0), id="one answer in three"),
    ],
)
def test_an_engine_that_works(server: StartedServer, answer: Callable[[int], Progress | None]) -> None:
    assert outcome(server, Engine(answer), 4 * STALL_SECONDS)[0] is None


def test_an_engine_that_has_nothing_to_write(server: StartedServer) -> None:
    assert outcome(server, Engine(lambda asked: Progress(0, 0)), 3 * STALL_SECONDS, writing=False)[0] is None


def test_an_event_loop_that_was_blocked_is_not_the_engines_fault(server: StartedServer) -> None:
    """As in a push, which gathers weights between two buckets: answers come, and nobody is there to read them."""

    class Blocked(Engine):
        begun = 0

        async def progress(self) -> Progress:
            self.begun += 1
            await asyncio.sleep(0.01)
            if self.begun % 3 == 0:
                time.sleep(STALL_SECONDS)
            await asyncio.sleep(0.01)
            return await super().progress()

    engine = Blocked(lambda asked: Progress(asked, 0))
    assert outcome(server, engine, 8 * STALL_SECONDS)[0] is None
    assert engine.begun > engine.asked >= 6, "some questions ran out of time"


def test_what_an_engine_says_itself_is_passed_on(server: StartedServer) -> None:
    class Dead(Engine):
        async def progress(self) -> Progress:
            raise EngineError("engine 3 is dead")

    assert outcome(server, Dead(lambda asked: None), 5)[0] == "engine 3 is dead"


def test_where_this_process_is_too_busy_to_read_an_answer_the_engine_is_not_to_blame(server: StartedServer) -> None:
    class Slow(Engine):
        async def progress(self) -> Progress:
            await asyncio.sleep(0.05)
            await asyncio.sleep(0)  # several turns of the loop, as a request takes
            return await super().progress()

    async def main() -> None:
        async def busy() -> None:
            while True:
                time.sleep(0.8)
                await asyncio.sleep(0)

        async with asyncio.timeout(8):
            watching = watch(
                Slow(lambda asked: Progress(asked, 0)),  # pyright: ignore[reportArgumentType]
                server,
                STALL_SECONDS,
                writing=lambda: False,
                seen=lambda progress: None,
            )
            await asyncio.gather(watching, busy())

    with pytest.raises(TimeoutError):
        asyncio.run(main())
