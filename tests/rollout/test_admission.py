"""Who gets a place, when, and where. Work that is let in waits until it is told to end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from dapo_megatron.rollout.admission import Admission


class Work:
    """Pieces of work by name, on engines that hold 32 sequences each."""

    def __init__(self, engines: int) -> None:
        self.admission = Admission(engines, sequences=32)
        self.began: list[tuple[str, int]] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.ends: dict[str, asyncio.Future[None]] = {}

    async def begin(self, names: str, sequences: int = 16) -> None:
        for name in names:
            self.ends[name] = asyncio.get_running_loop().create_future()
            self.tasks[name] = asyncio.create_task(self._piece(name, sequences))
        await self.settle()

    async def end(self, names: str) -> None:
        for name in names:
            self.ends[name].set_result(None)
        await self.settle()

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def _piece(self, name: str, sequences: int) -> None:
        async with self.admission.place(sequences) as engine:
            self.began.append((name, engine))
            await self.ends[name]


def let(engines: int, script: Callable[[Work], Awaitable[None]]) -> None:
    async def main() -> None:
        work = Work(engines)
        await script(work)
        for task in work.tasks.values():
            task.cancel()
        await asyncio.gather(*work.tasks.values(), return_exceptions=True)
        assert work.admission.held == (0,) * engines

    asyncio.run(main())


def test_first_come_first_served_up_to_the_bound() -> None:
    async def script(work: Work) -> None:
        await work.begin("abcde")
        assert work.began == [("a", 0), ("b", 0)]
        await work.end("b")
        assert work.began[2:] == [("c", 0)]
        await work.end("ac")
        assert work.began[3:] == [("d", 0), ("e", 0)]

    let(1, script)


def test_the_engine_with_the_least_to_do_is_next() -> None:
    async def script(work: Work) -> None:
        await work.begin("a", 8)
        await work.begin("bcdef")
        assert work.began == [("a", 0), ("b", 1), ("c", 0), ("d", 1)]
        await work.end("c")
        assert work.began[4:] == [("e", 0)]
        await work.end("bd")
        assert work.began[5:] == [("f", 1)]

    let(2, script)


def test_sequences_that_ended_make_room_before_their_prompt_is_answered() -> None:
    async def script(work: Work) -> None:
        await work.begin("abcd")
        work.admission.finished(0, 15)
        await work.settle()
        assert work.began == [("a", 0), ("b", 0)]
        work.admission.finished(0, 16)
        await work.settle()
        assert work.began[2:] == [("c", 0)]
        # b is answered: its sequences are among those that ended, and must not count twice.
        await work.end("b")
        assert work.began[3:] == []
        work.admission.finished(0, 1000)
        await work.settle()
        assert work.began[3:] == [("d", 0)]

    let(1, script)


def test_more_than_the_bound_runs_alone() -> None:
    async def script(work: Work) -> None:
        await work.begin("a")
        await work.begin("b", 100)
        await work.begin("c")
        assert work.began == [("a", 0)], "nobody overtakes"
        await work.end("a")
        assert work.began[1:] == [("b", 0)]
        await work.end("b")
        assert work.began[2:] == [("c", 0)]

    let(1, script)


@pytest.mark.parametrize("waiting", ["c", "d"])
def test_whoever_stops_waiting_holds_up_nobody(waiting: str) -> None:
    async def script(work: Work) -> None:
        await work.begin("abcde")
        work.tasks[waiting].cancel()
        await work.end("ab")
        assert [name for name, _ in work.began] == ["a", "b", *"cde".replace(waiting, "")]

    let(1, script)


def test_what_is_cancelled_or_fails_while_it_runs_gives_its_place_away() -> None:
    async def script(work: Work) -> None:
        await work.begin("abcd")
        work.tasks["a"].cancel()
        work.ends["b"].set_exception(ValueError("no"))
        await work.settle()
        assert [name for name, _ in work.began] == ["a", "b", "c", "d"]
        assert isinstance(work.tasks["b"].exception(), ValueError)

    let(1, script)


def test_a_place_given_to_one_who_is_cancelled_in_the_same_moment_is_not_lost() -> None:
    async def script(work: Work) -> None:
        await work.begin("abcd")
        work.ends["a"].set_result(None)
        await asyncio.sleep(0)  # a has left, and c has its place without having run
        assert work.admission.held == (32,)
        work.tasks["c"].cancel()
        await work.settle()
        assert [name for name, _ in work.began] == ["a", "b", "d"]

    let(1, script)
