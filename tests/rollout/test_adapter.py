"""Finding an adapter, and a whole run of one that came with no other file of the package: the seam is complete."""

from __future__ import annotations

import asyncio
import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from dapo_megatron.config import Config
from dapo_megatron.config_file import parse
from dapo_megatron.errors import ConfigError, EngineError
from dapo_megatron.rollout.adapter import adapter_for
from dapo_megatron.rollout.adapters.vllm import Adapter
from dapo_megatron.rollout.engine import Sampling
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.types import Completion, Prompt
from tests.helpers.completions import read, written
from tests.helpers.greeter import Greeter, GreeterEngine

PROMPT = Prompt("p", (3, 4), "", "")
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=4, stop_token_ids=())


def config(kind: str, **engine: Any) -> Config:
    return parse({"model": {"path": "m"}, "data": {"train": "t"}, "engine": {"kind": kind, **engine}})


class Own(Greeter):
    """Says for itself what others say for all of their kind."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.packages, self.health = {}, "/up"


def test_an_adapter_may_say_for_itself_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("packages", "health"):
        monkeypatch.delattr(Greeter, name)
    assert adapter_for(config(f"{__name__}:Own"), f"{__name__}:Own").health == "/up"
    with pytest.raises(ConfigError, match="lacks health, packages"):
        adapter_for(config("x"), "tests.helpers.greeter:Greeter")


def test_an_adapter_from_elsewhere_runs_and_load_is_spread(tmp_path: Path) -> None:
    engines = Engines(config("tests.helpers.greeter:Greeter", count=2), tmp_path, ranks=0)

    async def ask() -> list[list[Completion]]:
        return await asyncio.gather(*(engines.generate(PROMPT, SAMPLING, 2) for _ in range(4)))

    try:
        engines.wait_ready()
        assert [engine.name for engine in engines] == ["engine 0", "engine 1"]
        answers = [answer for answers in engines.run(ask()) for answer in answers]
        texts = sorted(read(answer.token_ids) for answer in answers)
        assert texts == ["hello from 0"] * 4 + ["hello from 1"] * 4
    finally:
        engines.close()
        engines.close()
    assert (tmp_path / "engine1.log").exists()


def test_engines_that_are_not_needed_at_once_are_started_when_they_are(tmp_path: Path) -> None:
    with closing(Engines(config("tests.helpers.greeter:Greeter"), tmp_path, ranks=0, at_once=False)) as engines:
        assert not list(engines) and not (tmp_path / "engine0.log").exists()
        engines.wait_ready()
        assert len(list(engines)) == 1
        engines.wait_ready()
        assert len(list(engines)) == 1


class Spelled:
    times = 0

    def __repr__(self) -> str:
        self.times += 1
        return "spelled"


def test_the_result_of_a_run_is_not_spelled_on_its_way(tmp_path: Path) -> None:
    """asyncio does that with a task's result, and a rollout holds millions of tokens."""
    with closing(Engines(config("tests.helpers.greeter:Greeter"), tmp_path, ranks=0)) as engines:
        assert engines.run(asyncio.sleep(0, Spelled())).times == 0


@pytest.mark.parametrize(
    ("number", "says"), [(signal.SIGSTOP, "engine 1 does not answer"), (signal.SIGKILL, "engine 1, /: ")]
)
def test_an_engine_that_hangs_or_dies_ends_whatever_is_being_done(
    tmp_path: Path, number: signal.Signals, says: str
) -> None:
    """Its guard, which is to end it, hangs as well."""
    cancelled = False

    async def work() -> None:
        nonlocal cancelled
        try:
            await asyncio.sleep(0.3)
            for process in reversed(family):
                process.send_signal(number)
            await asyncio.sleep(60)
        finally:
            cancelled = True

    engines = Engines(config("tests.helpers.greeter:Greeter", count=2, stall_seconds=1.5), tmp_path, ranks=0)
    try:
        engines.wait_ready()
        guards = [p for p in psutil.Process().children() if "dapo_megatron.rollout.guard" in p.cmdline()]
        family = [guards[1], *guards[1].children(recursive=True)]
        with pytest.raises(EngineError, match=says):
            engines.run(work())
        assert cancelled
    finally:
        engines.close()
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("answer", [[], [written("a"), replace(written("b"), versions=())]])
def test_an_engine_that_answers_too_little_is_told_from_a_small_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: list[Completion]
) -> None:
    async def generate(*_: object) -> list[Completion]:
        return answer

    monkeypatch.setattr(GreeterEngine, "generate", generate)
    with closing(Engines(config("tests.helpers.greeter:Greeter"), tmp_path, ranks=0)) as engines:
        engines.wait_ready()
        with pytest.raises(EngineError, match="engine 0: asked for 2 responses to prompt p"):
            engines.run(engines.generate(PROMPT, SAMPLING, 2))


def test_an_engine_may_take_its_time_for_the_first_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles kernels, longer than it may ever stall later; but not for ever."""

    async def compiles(*_: object) -> list[Completion]:
        await asyncio.sleep(1.0)
        return []

    monkeypatch.setattr(GreeterEngine, "generate", compiles)
    with closing(Engines(config("tests.helpers.greeter:Greeter", stall_seconds=0.3), tmp_path, ranks=0)) as engines:
        engines.wait_ready()
    slow = config("tests.helpers.greeter:Greeter", startup_seconds=0.9)
    says = r"written a token within 0.9 s \(engine.startup_seconds\)\nengine 0 has not ended"
    with closing(Engines(slow, tmp_path, ranks=0)) as engines, pytest.raises(EngineError, match=says):
        engines.wait_ready()


def test_the_kind_is_the_name_of_a_module() -> None:
    assert isinstance(adapter_for(config("vllm"), "vllm"), Adapter)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("vlm", "engine.kind: 'vlm' is not known; known are sglang, vllm, or some.module:NAME for another"),
        (
            "no.such.module:Adapter",
            "'no.such.module:Adapter' cannot be loaded: ModuleNotFoundError: No module named 'no'",
        ),
        ("json:Adapter", "module 'json' has no attribute 'Adapter'"),
        (":Adapter", "Empty module name"),
        ("json:JSONDecoder", "json:JSONDecoder lacks check, command, connect, environment, health, packages"),
    ],
)
def test_a_kind_that_is_not_there(kind: str, message: str) -> None:
    with pytest.raises(ConfigError) as failure:
        adapter_for(config(kind), kind)
    assert message in str(failure.value)
