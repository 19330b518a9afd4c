"""Engines that give up their memory for a while, and what becomes of those that fail meanwhile."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dapo_megatron.config_file import parse
from dapo_megatron.errors import EngineError
from dapo_megatron.rollout import engines as module
from dapo_megatron.rollout.engine import KV_CACHE, WEIGHTS, Sampling
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.types import Prompt
from tests.helpers.greeter import GreeterEngine
from tests.helpers.guards import guards
from tests.rollout.test_engines import asked, hurt, push

PROMPT = Prompt("p", (3, 4), "", "")
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=4, stop_token_ids=())


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    monkeypatch.setattr(module, "_BACKOFF_SECONDS", 0.01)
    engine = {"kind": "tests.helpers.greeter:Greeter", "stall_seconds": 5.0, "count": 2, "placement": "colocated"}
    made = Engines(parse({"model": {"path": "m"}, "data": {"train": "t"}, "engine": engine}), tmp_path, ranks=2)
    made.wait_ready()
    yield made
    made.close()


def awake(engines: Engines) -> list[set[str]]:
    return [set(engine.awake) for engine in engines if isinstance(engine, GreeterEngine)]


def test_all_go_to_sleep_and_wake_as_they_are_told(engines: Engines) -> None:
    engines.sleep()
    assert awake(engines) == [set(), set()]
    engines.wake(WEIGHTS)
    assert awake(engines) == [{WEIGHTS}] * 2
    push(engines, 1)
    engines.wake(WEIGHTS, KV_CACHE)
    assert awake(engines) == [{WEIGHTS, KV_CACHE}] * 2
    measures = {name: measure.value for name, measure in engines.take_measures().items()}
    assert measures["engine/sleep_seconds"] > 0 and measures["engine/wake_seconds"] > 0
    assert not {"engine/sleep_seconds", "engine/wake_seconds"} & engines.take_measures().keys()


def test_one_that_dies_asleep_is_left_out_of_the_push_and_started_again_to_sample(engines: Engines) -> None:
    push(engines, 1)
    engines.sleep()
    hurt(signal.SIGKILL, 1)
    engines.wake(WEIGHTS)
    assert awake(engines) == [{WEIGHTS}]
    push(engines, 2)
    engines.wake(KV_CACHE)
    assert set(engines.sample(asked(engines, signal.SIGCONT))) == {"hello from 0"}
    engines.sleep()  # waits for the one that starts
    assert awake(engines) == [set(), set()]
    engines.wake(WEIGHTS)
    push(engines, 3)
    engines.wake(KV_CACHE)
    assert len(engines.sample(asked(engines, signal.SIGCONT))) == 8
    assert engines.take_measures()["engine/restarts"].value == 1


@pytest.mark.parametrize("how", ["hangs", "refuses"])
def test_one_that_does_not_give_up_its_memory_is_ended(
    engines: Engines, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = guards()[1].children(recursive=True)
    if how == "hangs":
        hurt(signal.SIGSTOP, 1)
    else:
        sleep = GreeterEngine.sleep

        async def refuse(self: GreeterEngine) -> None:
            if self.name == "engine 1":
                raise EngineError("engine 1, /sleep: HTTP 500: CUDA error")
            await sleep(self)

        monkeypatch.setattr(GreeterEngine, "sleep", refuse)
    engines.sleep()
    _, left = psutil.wait_procs(family, timeout=10)
    assert not left and awake(engines) == [set()]
    engines.wake(WEIGHTS, KV_CACHE)
    assert len(engines.sample(asked(engines, signal.SIGCONT))) == 8


def test_the_actor_takes_memory_to_push_again_only_when_no_engine_starts(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[int] = []

    def refill() -> None:
        there.append(len(list(engines)))
        engines.sleep()
        engines.wake(WEIGHTS)
        push(engines, 3)
        engines.wake(KV_CACHE)

    engines.refill = refill
    push(engines, 3)
    answer = GreeterEngine.generate
    begun = asyncio.Event()

    async def slow(self: GreeterEngine, prompt: Prompt, *rest: Any) -> Any:
        if prompt is not PROMPT and self.name == "engine 1" and not begun.is_set():  # its first words, late
            begun.set()
            await asyncio.sleep(1.0)
        return await answer(self, prompt, *rest)

    monkeypatch.setattr(GreeterEngine, "generate", slow)
    assert len(engines.sample(asked(engines, signal.SIGKILL, 0, 1))) == 8
    assert there == [2] and begun.is_set()


def test_what_an_engine_that_failed_before_has_left_is_ended(engines: Engines) -> None:
    family = [child for guard in guards() for child in guard.children(recursive=True)]
    engines.expect(1)
    engines.recover(EngineError("a push broke off, and nobody knows why"))
    engines.sleep()
    _, left = psutil.wait_procs(family, timeout=10)
    assert not left and not list(engines)


def test_one_that_starts_is_not_waited_for_where_the_run_stops(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.helpers.greeter.SERVER", "import time; time.sleep(60)")
    push(engines, 1)
    engines.sample(asked(engines, signal.SIGKILL, 1))
    engines.sleep(wait=False)
    assert awake(engines) == [set()] and len(guards()) == 1
