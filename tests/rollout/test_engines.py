"""What becomes of engines that fail while they sample, and of what they were asked for."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from dapo_megatron.config_file import parse
from dapo_megatron.errors import EngineError, RefusedError
from dapo_megatron.rollout import engines as module
from dapo_megatron.rollout.engine import Engine, Sampling
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.rollout.server import StartedServer
from dapo_megatron.types import Completion, Prompt
from tests.helpers.completions import read
from tests.helpers.greeter import GreeterEngine
from tests.helpers.guards import guards
from tests.helpers.ports import free_ports

PROMPT = Prompt("p", (3, 4), "", "")
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=4, stop_token_ids=())


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACKOFF_SECONDS", 0.01)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    made: list[Engines] = []

    def make(**engine: Any) -> Engines:
        settings = {"kind": "tests.helpers.greeter:Greeter", "stall_seconds": 1.5, **engine}
        values = {"model": {"path": "m"}, "data": {"train": "t"}, "engine": settings}
        made.append(Engines(parse(values), tmp_path, ranks=0))
        made[0].wait_ready()
        return made[0]

    yield make
    for engines in made:
        engines.close()


def hurt(number: signal.Signals, *indices: int) -> None:
    there = guards()
    for index in indices:
        for process in (*there[index].children(recursive=True), there[index]):
            process.send_signal(number)


async def asked(engines: Engines, number: signal.Signals, *indices: int) -> list[str]:
    """Who answers 8 requests, in the midst of which some engines are sent a signal."""
    first = await engines.generate(PROMPT, SAMPLING, 1)
    hurt(number, *indices)
    others = await asyncio.gather(*(engines.generate(PROMPT, SAMPLING, 1) for _ in range(7)))
    return sorted(read(answer.token_ids) for answers in [first, *others] for answer in answers)


def noting_versions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Versions of the engines that were asked for responses."""
    generate, versions = GreeterEngine.generate, list[int]()

    async def noted(self: GreeterEngine, prompt: Prompt, *rest: Any) -> list[Completion]:
        if prompt is PROMPT:
            versions.append(self.version)
        return await generate(self, prompt, *rest)

    monkeypatch.setattr(GreeterEngine, "generate", noted)
    return versions


def restarts(engines: Engines) -> float:
    return engines.take_measures()["engine/restarts"].value


def push(engines: Engines, version: int) -> None:
    async def finish(there: list[Engine]) -> None:
        for engine in there:
            await engine.finish_transfer(version)

    engines.expect(version)
    engines.run(finish(list(engines)))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_what_an_engine_did_not_answer_others_do(opened: Any, number: signal.Signals) -> None:
    engines = opened(count=2)
    answers = engines.sample(asked(engines, number, 1))
    assert len(answers) == 8 and "hello from 0" in answers
    for _ in range(100):  # it takes a moment to be there again
        engines.sample(asyncio.sleep(0.1))
        if len(list(engines)) == 2:
            break
    assert restarts(engines) == 1
    assert restarts(engines) == 0
    assert set(engines.sample(asked(engines, signal.SIGCONT))) == {"hello from 0", "hello from 1"}


def test_an_engine_that_has_other_weights_than_it_got_is_started_again(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else may have started it again, or use it, too."""
    engines = opened(max_restarts=0)
    monkeypatch.setattr(GreeterEngine, "wrote", lambda self: self.version + 1)
    with pytest.raises(EngineError, match=r"prompt p with weights of version 1, and got version 0 last"):
        engines.sample(engines.generate(PROMPT, SAMPLING, 1))


def test_engines_that_need_no_other_weights_than_they_start_with_need_no_push(opened: Any) -> None:
    engines = opened(count=2)
    assert len(engines.sample(asked(engines, signal.SIGKILL, 0, 1))) == 8
    assert restarts(engines) in (1, 2)  # the first one that is there may have answered all


def test_where_no_engine_has_the_weights_they_are_asked_for_and_only_then(opened: Any) -> None:
    engines = opened(count=2)
    pushed: list[int] = []

    def refill() -> None:
        pushed.append(len(list(engines)))
        push(engines, 3)

    engines.refill = refill
    push(engines, 3)
    assert len(engines.sample(asked(engines, signal.SIGKILL, 0))) == 8
    assert pushed == [] and engines.version == 3
    assert len(engines.sample(asked(engines, signal.SIGKILL, 0, 1))) == 8
    assert len(pushed) == 1 and pushed[0] >= 1 and engines.version == 3


def test_an_engine_that_was_started_again_answers_nothing_before_it_has_the_weights(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = opened(count=2)
    versions = noting_versions(monkeypatch)
    push(engines, 3)
    engines.sample(asked(engines, signal.SIGKILL, 1))
    for _ in range(100):
        engines.sample(asyncio.sleep(0.1))
        if len(list(engines)) == 2:
            break
    assert set(engines.sample(asked(engines, signal.SIGCONT))) == {"hello from 0"}
    push(engines, 4)
    assert set(engines.sample(asked(engines, signal.SIGCONT))) == {"hello from 0", "hello from 1"}
    assert set(versions) == {3, 4}


def test_an_engine_that_fails_too_often_is_given_up_until_the_next_weights(opened: Any) -> None:
    engines = opened(max_restarts=1)
    engines.sample(asked(engines, signal.SIGKILL, 0))
    with pytest.raises(EngineError, match=r"(?s)engine 0.*given up: it was started again 1 times since it last"):
        engines.sample(asked(engines, signal.SIGKILL, 0))


def test_one_that_fails_with_all_weights_is_given_up(opened: Any) -> None:
    engines = opened(count=2, max_restarts=1)
    push(engines, 1)
    engines.sample(asked(engines, signal.SIGKILL, 1))
    while len(names(engines)) < 2:
        engines.sample(asyncio.sleep(0.1))
    push(engines, 2)
    with pytest.raises(EngineError, match=r"(?s)engine 1.*given up: it was started again 1 times since it last kept"):
        engines.sample(asked(engines, signal.SIGKILL, 1))


def test_the_count_begins_anew_with_the_next_weights(opened: Any) -> None:
    engines = opened(max_restarts=1)
    for version in (1, 2):
        push(engines, version)
        engines.refill = lambda version=version: push(engines, version)
        assert len(engines.sample(asked(engines, signal.SIGKILL, 0))) == 8


def names(engines: Engines) -> list[str]:
    return [engine.name for engine in engines]


def broken(engine: str | None = None) -> EngineError:
    """What a push broke off with, and whose answer that was."""
    error = EngineError(f"{engine}: HTTP 500: connection closed by peer")
    error.engine = engine
    return error


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_push_that_an_engine_broke_off_by_dying_or_hanging_is_made_again_with_the_others(
    opened: Any, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of them said first that something was wrong."""
    monkeypatch.setattr(module, "_RESET_SECONDS", 1.0)
    engines = opened(count=2)
    pushed: list[list[str]] = []

    def refill() -> None:
        pushed.append(names(engines))
        push(engines, 5)

    engines.refill = refill
    push(engines, 4)
    assert len(engines.sample(asked(engines, signal.SIGCONT))) == 8
    versions = noting_versions(monkeypatch)
    engines.expect(5)
    hurt(number, 1)
    engines.recover(broken("engine 0"))
    assert names(engines) == ["engine 0"] and restarts(engines) == 0
    assert "hello from 0" in engines.sample(asked(engines, signal.SIGCONT))
    assert pushed[0] == ["engine 0"] and set(versions) == {5}, "it may have had anything"
    assert restarts(engines) == 1


def test_the_engine_whose_answer_broke_off_a_push_is_started_again(opened: Any) -> None:
    engines = opened(count=2)
    engines.expect(5)
    engines.recover(broken("engine 0"))
    assert names(engines) == ["engine 1"]


def test_one_that_hangs_in_a_push_is_known_by_it(opened: Any) -> None:
    engines = opened(count=2)

    async def forever() -> None:
        hurt(signal.SIGSTOP, 1)
        await asyncio.sleep(60)

    with pytest.raises(EngineError, match="engine 1 does not answer"):
        engines.run(forever())
    assert names(engines) == ["engine 0"]


@pytest.mark.parametrize("again", [False, True])
def test_where_nobody_is_known_to_be_at_fault_all_are_started_again(opened: Any, again: bool) -> None:
    """Or where the engine that was, does not seem to have been the only one."""
    engines = opened(count=3)
    engines.refill = lambda: push(engines, 5)
    engines.expect(5)
    if again:
        engines.recover(broken("engine 0"))
        assert names(engines) == ["engine 1", "engine 2"]
        engines.expect(5)
    engines.recover(broken("engine 1" if again else None))
    assert not list(engines)
    assert len(engines.sample(asked(engines, signal.SIGCONT))) == 8
    assert engines.version == 5


def test_a_push_in_the_midst_of_a_rollout_that_breaks_off_too_leaves_the_rollout_alone(opened: Any) -> None:
    """Also what it begins to ask for meanwhile."""
    engines = opened(count=2)
    pushes: list[list[str]] = []
    asked_for = asyncio.Event()

    async def breaks_off() -> None:
        asked_for.set()
        await asyncio.sleep(0.2)
        raise broken("engine 1")

    def refill() -> None:
        pushes.append(names(engines))
        if len(pushes) > 1:
            push(engines, 5)
            return
        engines.expect(5)
        with pytest.raises(EngineError) as error:
            engines.run(breaks_off())
        engines.recover(error.value)

    async def rollout() -> list[str]:
        early = asyncio.ensure_future(asked(engines, signal.SIGCONT))
        await asked_for.wait()
        return [*await asked(engines, signal.SIGCONT), *await early]

    engines.refill = refill
    engines.expect(5)
    engines.recover(broken("engine 1"))
    assert len(engines.sample(rollout())) == 16
    assert pushes[0] == ["engine 0"] and len(pushes) == 2


def test_an_engine_that_had_failed_before_a_push_is_not_taken_for_the_one_that_broke_it_off(opened: Any) -> None:
    engines = opened(count=3)
    engines.expect(5)
    engines.ask(_fails_in("engine 0"))
    engines.recover(broken("engine 1"))
    assert names(engines) == ["engine 2"]


def _fails_in(name: str) -> Any:
    async def question(engine: Engine) -> None:
        if engine.name == name:
            raise EngineError(f"{name}: nonsense")

    return question


def test_an_engine_is_started_again_when_its_processes_have_ended(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes, and whatever else wants to be done meanwhile: it has the port that it had."""
    engines = opened(count=2, port=free_ports(2))
    close = StartedServer.close

    def slow(self: StartedServer) -> None:
        time.sleep(1.0)
        close(self)

    monkeypatch.setattr(StartedServer, "close", slow)
    engines.refill = lambda: push(engines, 5)
    engines.expect(5)
    hurt(signal.SIGSTOP, 1)
    engines.recover(broken("engine 1"))
    assert len(engines.sample(asked(engines, signal.SIGCONT, 0))) == 8
    while len(names(engines)) < 2:
        engines.sample(asyncio.sleep(0.1))
    assert restarts(engines) == 1


def test_the_next_weights_begin_anew(opened: Any) -> None:
    engines = opened(count=3)
    for version, left in ((1, ["engine 1", "engine 2"]), (2, ["engine 2"])):
        engines.expect(version)
        engines.recover(broken(f"engine {version - 1}"))
        assert names(engines) == left


def test_only_the_engine_that_does_not_answer_a_question_is_left_out(opened: Any) -> None:
    engines = opened(count=3)

    async def question(engine: Engine) -> str:
        if engine.name == "engine 1":
            raise EngineError("engine 1: nonsense")
        if engine.name == "engine 2":
            hurt(signal.SIGSTOP, 2)
            await asyncio.sleep(60)
        return engine.name

    assert engines.ask(question) == ["engine 0"]
    assert names(engines) == ["engine 0"]
    assert set(engines.sample(asked(engines, signal.SIGCONT))) >= {"hello from 0"}
    assert restarts(engines) == 2


def test_a_request_that_is_refused_is_not_made_again(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = opened()
    calls = 0

    async def refuse(*_: object) -> list[Completion]:
        nonlocal calls
        calls += 1
        raise RefusedError("engine 0: HTTP 400: the prompt is too long")

    monkeypatch.setattr(GreeterEngine, "generate", refuse)
    with pytest.raises(RefusedError, match="too long"):
        engines.sample(engines.generate(PROMPT, SAMPLING, 1))
    assert calls == 1 and restarts(engines) == 0


def test_what_fails_for_another_reason_ends_at_once(opened: Any) -> None:
    engines = opened()

    async def work() -> None:
        await engines.generate(PROMPT, SAMPLING, 1)
        raise ValueError("not an engine's fault")

    with pytest.raises(ValueError, match="not an engine's fault"):
        engines.sample(work())
    assert restarts(engines) == 0


def test_an_engine_that_does_not_come_up_again_is_given_up(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = opened(max_restarts=2)
    monkeypatch.setattr("tests.helpers.greeter.SERVER", "raise SystemExit(3)")
    with pytest.raises(EngineError, match=r"(?s)engine 0 ended with exit status 3.*started again 2 times"):
        engines.sample(asked(engines, signal.SIGKILL, 0))


def test_closing_after_failures_leaves_nothing(opened: Any) -> None:
    with closing(opened(count=2, max_restarts=0)) as engines:
        family = [process for guard in guards() for process in (guard, *guard.children(recursive=True))]
        with pytest.raises(EngineError, match=r"given up: engine\.max_restarts is 0"):
            engines.sample(asked(engines, signal.SIGSTOP, 0, 1))
    _, left = psutil.wait_procs(family, timeout=10)
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
