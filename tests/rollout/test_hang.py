"""Real vLLM engines that are stopped and not ended: nothing dies, nothing answers."""

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
from dapo_megatron.errors import EngineError
from dapo_megatron.rollout.engine import Sampling
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.types import Prompt

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

STALL_SECONDS = 6.0
PUSH_SECONDS = 8.0
PROMPT = Prompt("p", (3, 4, 5), "", "")
ENDLESS = Sampling(temperature=1.0, top_p=1.0, max_tokens=64, stop_token_ids=())

Family = list[psutil.Process]


@pytest.fixture
def running(tiny_values: dict[str, Any], tmp_path: Path) -> Iterator[tuple[Engines, Family]]:
    """An engine with all of its processes, guard first. None of them may be left."""
    values = tiny_values | {
        "engine": tiny_values["engine"] | {"stall_seconds": STALL_SECONDS},
        "weights": {"push_seconds": PUSH_SECONDS},
    }
    with closing(Engines(parse(values), tmp_path, ranks=0)) as engines:
        engines.wait_ready()
        (guard,) = [p for p in psutil.Process().children() if "dapo_megatron.rollout.guard" in p.cmdline()]
        family = [guard, *guard.children(recursive=True)]
        yield engines, family
        ended = time.monotonic()
    assert time.monotonic() - ended < 8
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def core(family: Family) -> Family:
    """The process that holds the model; the server is another."""
    found = [process for process in family if process.name().startswith("VLLM::Engine")]
    assert len(found) == 1, family
    return found


async def writing(engines: Engines, stopped: Family) -> None:
    """Responses without end, in the midst of which processes are stopped."""
    (engine,) = engines
    tasks = [asyncio.ensure_future(engines.generate(PROMPT, ENDLESS, 500)) for _ in range(8)]
    while not (await engine.progress()).tokens:
        await asyncio.sleep(0.01)
    stop(stopped)
    await asyncio.gather(*tasks)


def stop(processes: Family) -> None:
    for process in processes:
        process.send_signal(signal.SIGSTOP)


def fails(engines: Engines, work: Any, says: str, limit: str = "engine.stall_seconds") -> None:
    started = time.monotonic()
    with pytest.raises(EngineError, match=says) as failure:
        engines.run(work)
    assert time.monotonic() - started < max(STALL_SECONDS, PUSH_SECONDS) + 4
    assert limit in str(failure.value) and "engine0.log" in str(failure.value)


@pytest.mark.long
def test_an_engine_that_hangs_as_a_whole(running: tuple[Engines, Family]) -> None:
    engines, family = running
    fails(engines, writing(engines, family), "engine 0 does not answer: 3 questions in 6 s")


def test_an_engine_whose_server_answers_for_a_model_that_hangs(running: tuple[Engines, Family]) -> None:
    engines, family = running
    fails(engines, writing(engines, core(family)), "engine 0 answers, but has not written a single token for 6 s")


def test_a_model_that_hangs_in_a_transfer(running: tuple[Engines, Family]) -> None:
    engines, family = running
    (engine,) = engines
    stop(core(family))
    fails(engines, engine.begin_transfer(), "engine 0, /pause.*: no answer within 8 s", "weights.push_seconds")


@pytest.mark.long
def test_an_engine_that_hangs_in_a_transfer(running: tuple[Engines, Family]) -> None:
    """Its server, too, which the watch notices first."""
    engines, family = running
    (engine,) = engines
    stop(family)
    fails(engines, engine.begin_transfer(), "engine 0 does not answer: 3 questions in 6 s")
