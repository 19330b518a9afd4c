"""Engines that somebody else starts: told by their URL and token, never started or ended, waited for."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from dapo_megatron.config_file import parse
from dapo_megatron.errors import ConfigError, EngineError
from dapo_megatron.rollout import engines as module
from dapo_megatron.rollout.engine import Engine, Sampling
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.rollout.token import TOKEN, make_token
from dapo_megatron.types import Prompt
from tests.helpers.checkpoint import values
from tests.helpers.completions import read
from tests.helpers.greeter import GreeterEngine
from tests.helpers.guards import guards

PROMPT = Prompt("p", (3, 4), "", "")
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=4, stop_token_ids=())


class Elsewhere:
    """Two engines that run on their own, and what a run says of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token = folder, make_token()
        self.values = values(folder)
        self.values["engine"] = {"kind": "tests.helpers.greeter:Greeter", "stall_seconds": 5.0, "startup_seconds": 60}
        self.port: int | None = None
        self.engines = self.start()
        self.urls = self.engines.urls
        self.port = int(self.urls[0].rpartition(":")[2])

    def config(self, **engine: Any) -> Any:
        return parse(self.values | {"engine": self.values["engine"] | engine})

    def start(self, **engine: Any) -> Engines:
        engines = Engines(self.config(count=1, port=self.port, **engine), self.folder, ranks=0, token=self.token)
        engines.wait_ready()
        return engines

    def run(self, **engine: Any) -> Engines:
        return Engines(self.config(placement="external", urls=self.urls, **engine), self.folder / "run", ranks=0)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    monkeypatch.setattr(module, "_BACKOFF_SECONDS", 0.01)
    there = Elsewhere(tmp_path)
    monkeypatch.setenv(TOKEN, there.token)
    yield there
    there.engines.close()


def push(engines: Engines, version: int) -> None:
    async def finish(there: list[Engine]) -> None:
        for engine in there:
            await engine.finish_transfer(version)

    engines.expect(version)
    engines.run(finish(list(engines)))


def ask(engines: Engines) -> str:
    ((answer,),) = (engines.sample(engines.generate(PROMPT, SAMPLING, 1)),)
    return read(answer.token_ids)


def servers() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_they_are_used_and_neither_started_nor_ended(elsewhere: Elsewhere) -> None:
    before = servers()
    with closing(elsewhere.run()) as engines:
        engines.wait_ready()
        assert servers() == before
        assert [engine.name for engine in engines] == [f"engine 0 ({elsewhere.urls[0]})"]
        push(engines, 0)
        assert ask(engines) == "hello from 0"
    assert servers() == before and ask(elsewhere.engines) == "hello from 0"


def test_what_they_had_before_is_never_sampled_with(elsewhere: Elsewhere) -> None:
    """Not even at the first step, whose weights an engine of the run's own would start with."""
    with closing(elsewhere.run()) as engines:
        engines.wait_ready()
        pushed: list[int] = []
        engines.refill = lambda: (pushed.append(0), push(engines, 0))[1]
        ask(engines)
        ask(engines)
    assert pushed == [0]


def test_one_that_was_away_is_waited_for_and_gets_the_weights(elsewhere: Elsewhere) -> None:
    with closing(elsewhere.run()) as engines:
        engines.wait_ready()
        push(engines, 3)
        pushed: list[int] = []
        engines.refill = lambda: (pushed.append(3), push(engines, 3))[1]

        async def end_and_start() -> str:
            await asyncio.to_thread(elsewhere.engines.close)
            asked = asyncio.ensure_future(engines.generate(PROMPT, SAMPLING, 1))
            await asyncio.sleep(0.5)
            assert not asked.done()
            elsewhere.engines = await asyncio.to_thread(elsewhere.start)
            return read((await asked)[0].token_ids)

        assert engines.sample(end_and_start()) == "hello from 0"
        assert pushed == [3] and engines.take_measures()["engine/restarts"].value >= 1


def test_one_that_stays_away_is_given_up(elsewhere: Elsewhere) -> None:
    with closing(elsewhere.run(max_restarts=1, startup_seconds=1.0)) as engines:
        engines.wait_ready()
        push(engines, 0)
        elsewhere.engines.close()
        with pytest.raises(EngineError, match=r"(?s)did not answer within 1 s .*firewall.*waited for 1 times"):
            ask(engines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_fails_over_there_is_said_with_where_its_log_is(elsewhere: Elsewhere, number: signal.Signals) -> None:
    with closing(elsewhere.run(max_restarts=0)) as engines:
        engines.wait_ready()
        push(engines, 0)
        (guard,) = guards()
        for child in (*guard.children(), guard):
            child.send_signal(number)
        psutil.wait_procs([guard], timeout=10)
        with pytest.raises(EngineError, match=r"(?s)engine 0 \(http.*not started by this run: its log is on its own"):
            ask(engines)


def test_another_token_is_refused_by_name(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, make_token())
    with closing(elsewhere.run()) as engines, pytest.raises(EngineError, match="HTTP 401") as error:
        engines.wait_ready()
    assert elsewhere.token not in str(error.value)


def test_another_model_is_refused_by_name(elsewhere: Elsewhere) -> None:
    config = elsewhere.folder / "model/config.json"
    config.write_text(config.read_text().replace('"vocab_size": 50', '"vocab_size": 64'))
    with closing(elsewhere.run(tensor_parallel=2)) as engines, pytest.raises(EngineError) as error:
        engines.wait_ready()
    said = str(error.value)
    assert f"engine 0 ({elsewhere.urls[0]}) is no engine for this run" in said
    assert "vocab_size of the model's config.json is 50, and 64 in this run" in said
    assert "engine.tensor_parallel is 1, and 2 in this run" in said


def test_one_that_takes_shorter_sequences_is_refused(elsewhere: Elsewhere) -> None:
    elsewhere.values["data"] = elsewhere.values["data"] | {"max_prompt_tokens": 9}
    with closing(elsewhere.run()) as engines, pytest.raises(EngineError, match=r"of 24 tokens, and .* = 25"):
        engines.wait_ready()


def test_what_another_run_left_is_cleared_before_anything_is_asked(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    generate = GreeterEngine.generate

    async def reset(self: GreeterEngine) -> None:
        done.append("reset")

    async def asked(self: GreeterEngine, *how: Any) -> Any:
        done.append("asked")
        return await generate(self, *how)

    monkeypatch.setattr(GreeterEngine, "reset", reset)
    monkeypatch.setattr(GreeterEngine, "generate", asked)
    with closing(elsewhere.run()) as engines:
        engines.wait_ready()
    assert done == ["reset", "asked"]


def test_without_a_token_nothing_begins(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN)
    with pytest.raises(ConfigError, match="their token is not here"):
        elsewhere.run()
