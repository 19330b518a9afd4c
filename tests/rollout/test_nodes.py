"""Engines that another node's first rank starts: here it is a thread, and its letters come at once."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from dapo_megatron.config import Config, EngineConfig
from dapo_megatron.config_file import parse
from dapo_megatron.errors import ConfigError, DapoError, EngineError
from dapo_megatron.rollout import engines as module
from dapo_megatron.rollout.engine import Engine, Sampling
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.rollout.node import NodeEngines, introduce
from dapo_megatron.rollout.nodes import Nodes, shares
from dapo_megatron.rollout.place import check_gpus, place
from dapo_megatron.rollout.plan import plan
from dapo_megatron.types import Prompt
from tests.helpers.completions import read
from tests.helpers.guards import guards
from tests.helpers.mail import Mailbox, mailboxes
from tests.helpers.ports import free_ports

HERE = socket.gethostname()
PROMPT = Prompt("p", (3, 4), "", "")
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=4, stop_token_ids=())
LOCAL_RANKS = 2
"""Ranks 0 and 1 are on node 0, ranks 2 and 3 on node 1, and so on."""


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACKOFF_SECONDS", 0.01)


def config(folder: Path, **engine: Any) -> Config:
    settings = {"kind": "tests.helpers.greeter:Greeter", "stall_seconds": 1.5, "startup_seconds": 30, **engine}
    run = {"dir": str(folder), "name": "run"}
    return parse({"model": {"path": "m"}, "data": {"train": "t"}, "engine": settings, "run": run})


Meet = Callable[..., tuple[Nodes, list[Mailbox]]]


@pytest.fixture
def meet(tmp_path: Path) -> Iterator[Meet]:
    """Has so many nodes, of two ranks each, meet the leader; gives what the leader knows of them, and all mailboxes."""
    with ExitStack() as stack:

        def make(
            machines: int = 2, check: Callable[[Config], object] = lambda config: None, **engine: Any
        ) -> tuple[Nodes, list[Mailbox]]:
            given = config(tmp_path, **engine)
            boxes = mailboxes(LOCAL_RANKS * machines)
            for rank, box in enumerate(boxes[1:], start=1):
                introduce(box, rank % LOCAL_RANKS)
                if rank % LOCAL_RANKS == 0:
                    starter = NodeEngines(given, box, check, master="127.0.0.1", ranks=LOCAL_RANKS)
                    stack.enter_context(closing(starter))
                stack.callback(box.leave)
            return Nodes(boxes[0], given, len(boxes), seconds=10.0), boxes

        yield make


@pytest.fixture
def opened(meet: Meet, tmp_path: Path) -> Iterator[Callable[..., Engines]]:
    with ExitStack() as stack:

        def make(**engine: Any) -> Engines:
            nodes, _ = meet(**engine)
            engines = Engines(config(tmp_path, **engine), tmp_path / "run", ranks=0, nodes=nodes)
            return stack.enter_context(closing(engines))

        yield make


def asked(engines: Engines, count: int = 8) -> list[str]:
    async def ask() -> list[str]:
        answers = await asyncio.gather(*(engines.generate(PROMPT, SAMPLING, 1) for _ in range(count)))
        return sorted({read(answer.token_ids) for (answer,) in answers})

    return engines.sample(ask())


def push(engines: Engines, version: int) -> None:
    async def finish(there: list[Engine]) -> None:
        for engine in there:
            await engine.finish_transfer(version)

    engines.expect(version)
    engines.run(finish(list(engines)))


@pytest.mark.parametrize(
    ("engine", "nodes", "expected"),
    [
        ({}, 3, [1, 0, 0]),
        ({"nodes": "all", "count": 6}, 3, [2, 2, 2]),
        ({"nodes": [2, 1], "count": 4}, 3, [0, 2, 2]),
    ],
)
def test_nodes_have_the_same_share(engine: dict[str, Any], nodes: int, expected: list[int]) -> None:
    assert shares(EngineConfig(**engine), nodes) == expected


@pytest.mark.parametrize(
    ("engine", "nodes", "message"),
    [
        ({"nodes": [0, 2]}, 2, r"engine\.nodes names 2, but this run has 2 nodes, 0 to 1"),
        ({"nodes": [1]}, 1, r"engine\.nodes names 1, but this run has node 0 alone"),
        ({"nodes": [0, 1], "count": 3}, 2, r"engine\.count\(3\) / 2 nodes \(engine\.nodes=\[0, 1\]\) = 1\.5 engines"),
        ({"nodes": "all", "count": 4}, 3, r"engine\.count\(4\) / 3 nodes \(engine\.nodes=all\) = 1\.33 engines"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(engine: dict[str, Any], nodes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shares(EngineConfig(**engine), nodes)


def test_engines_of_all_nodes_answer_with_tokens_of_their_own(
    opened: Callable[..., Engines], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    engines = opened(nodes="all", count=4)
    engines.wait_ready()
    push(engines, 0)
    assert [engine.name for engine in engines] == ["engine 0", "engine 1", f"engine 2 on {HERE}", f"engine 3 on {HERE}"]
    assert asked(engines) == [f"hello from {index}" for index in range(4)]
    tokens = [life.server.token for life in engines._lives]
    family = [process for guard in guards() for process in (guard, *guard.children(recursive=True))]
    words = [caplog.text, *(word for process in family for word in process.cmdline())]
    words += [path.read_text() for path in tmp_path.rglob("*.log")]
    assert len(set(tokens)) == 4 and not [token for token in tokens for word in words if token in word]
    engines.close()
    assert not psutil.wait_procs(family, timeout=10)[1]


def test_an_engine_of_another_node_is_started_again_there(
    opened: Callable[..., Engines], caplog: pytest.LogCaptureFixture
) -> None:
    engines = opened(nodes=[1], max_restarts=1)
    engines.wait_ready()
    urls = engines.urls
    push(engines, 3)
    engines.refill = lambda: push(engines, 3)
    (guard,) = guards()
    for process in guard.children():
        process.kill()
    assert asked(engines) == ["hello from 0"]
    assert engines.take_measures()["engine/restarts"].value == 1 and engines.urls == urls
    assert f"engine 0 on {HERE} ended with exit status 137 (signal 9)" in caplog.text
    assert "run/engine0.log" in caplog.text
    (guard,) = guards()
    for process in (*guard.children(), guard):
        process.send_signal(signal.SIGSTOP)
    with pytest.raises(EngineError, match=rf"(?s)engine 0 on {HERE} does not answer.*has not ended.*given up: it was"):
        asked(engines)


def test_the_end_of_the_log_of_one_that_does_not_come_up_is_shown(
    opened: Callable[..., Engines], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.helpers.greeter.SERVER", "print('no such device'); raise SystemExit(3)")
    with pytest.raises(EngineError, match=rf"engine 0 on {HERE} ended with exit status 3\n.*\n  \| no such device"):
        opened(nodes=[1]).wait_ready()


def test_one_that_never_answers_is_said_to_with_its_log_and_ended(
    opened: Callable[..., Engines], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.helpers.greeter.SERVER", "import time; print('busy', flush=True); time.sleep(100)")
    engines = opened(nodes=[1], startup_seconds=3)
    while "busy" not in engines._lives[0].server.describe():
        time.sleep(0.1)
    with pytest.raises(EngineError, match=r"(?s)did not answer at http://127\.0\.0\.1:\d+ within 3 s.*firewall.*busy"):
        engines.wait_ready()
    (guard,) = guards()
    engines.close()
    assert not psutil.wait_procs([guard], timeout=10)[1]


def test_a_node_that_leaves_takes_its_engines_with_it(meet: Meet, tmp_path: Path) -> None:
    nodes, boxes = meet(nodes=[1], max_restarts=0)
    with closing(Engines(config(tmp_path, nodes=[1], max_restarts=0), tmp_path, ranks=0, nodes=nodes)) as engines:
        engines.wait_ready()
        push(engines, 0)
        (guard,) = guards()
        guard.suspend()  # its end is not noticed, as on a machine that is lost
        for process in guard.children():
            process.kill()
        boxes[2].leave()
        with pytest.raises(EngineError, match=rf"engine 0 on {HERE} is gone: the connection to rank 2"):
            asked(engines)
        began = time.monotonic()
    assert time.monotonic() - began < 5, "nobody waits for what a node that is gone might say"
    assert not nodes.start(0, lambda: False).alive


def test_engines_have_ports_addresses_and_seeds_of_their_own(meet: Meet, tmp_path: Path) -> None:
    port = free_ports(2)
    nodes, _ = meet(nodes=[1], count=2, port=port)
    assert [nodes.place(index).url for index in range(2)] == [f"http://127.0.0.1:{port + slot}" for slot in range(2)]
    assert nodes.addresses == ["127.0.0.1"] and 1 in nodes and 2 not in nodes
    starter = NodeEngines(
        config(tmp_path, count=4), mailboxes(1)[0], lambda config: None, master="127.0.0.1", ranks=LOCAL_RANKS
    )
    with closing(starter):
        starter._prepare([2, 3])
        seeds = [starter._places[index].seed for index in (2, 3)]
    assert seeds == [place(config(tmp_path), index, 1).seed for index in (2, 3)]


def test_engines_listen_where_the_way_to_the_leader_begins(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Config] = []
    monkeypatch.setattr("dapo_megatron.rollout.node.address_for", lambda hosts: {"127.0.0.2"})
    nodes, _ = meet(check=checked.append, nodes="all", count=4)
    assert [(here.engine.host, here.engine.count) for here in checked] == [("127.0.0.2", 2)]
    assert [nodes.place(index).host for index in (2, 3)] == ["127.0.0.2"] * 2
    assert nodes.here.engine.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("engine", "line", "gpus"),
    [
        (
            {"count": 4, "nodes": "all"},
            "4 engines (tests.helpers.greeter:Greeter, tensor parallel 1) on 2 of 2 nodes, beside the GPUs of their "
            "ranks; weights by gloo from 127.0.0.1",
            ["2", "3"],
        ),
        (
            {"count": 2, "nodes": "all", "tensor_parallel": 2, "placement": "colocated"},
            "2 engines (tests.helpers.greeter:Greeter, tensor parallel 2) on 2 of 2 nodes, on the GPUs of their ranks; "
            "weights by gloo from 127.0.0.1",
            ["0,1"],
        ),
    ],
)
def test_engines_have_the_gpus_of_their_own_machine(
    meet: Meet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: dict[str, Any], line: str, gpus: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    nodes, _ = meet(**engine)
    here = "; ".join(f"engine {index} on GPU {gpu}" for index, gpu in enumerate(gpus))
    there = "; ".join(f"engine {index} on GPU {gpu}" for index, gpu in enumerate(gpus, start=len(gpus)))
    assert plan(config(tmp_path, **engine), LOCAL_RANKS, nodes) == (
        line,
        f"  node 0, this machine: 2 ranks, {here}",
        f"  node 1, {HERE}, 127.0.0.1: 2 ranks, {there}",
    )


@pytest.mark.parametrize("sleep", [None, False])
def test_the_leader_knows_that_engines_of_other_nodes_sleep(meet: Meet, sleep: bool | None) -> None:
    """They forget their weights then: nothing may be left out of a push."""
    nodes, _ = meet(nodes="all", count=2, placement="colocated", sleep=sleep)
    assert nodes.place(1).sleeps is (sleep is None)


def test_a_node_of_many_without_engines_is_not_told_and_starts_none(meet: Meet, tmp_path: Path) -> None:
    nodes, boxes = meet(machines=3, nodes=[2])
    assert plan(config(tmp_path), LOCAL_RANKS, nodes)[1:] == (f"  node 2, {HERE}, 127.0.0.1: 2 ranks, engine 0",)
    assert nodes.here.engine.count == 0 and nodes.count == 3
    assert [len(box.sent) for box in boxes[1:]] == [1, 1, 1, 2, 1], "who it is, and where engines will be"


def test_a_node_without_room_refuses_with_the_arithmetic(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    with pytest.raises(ConfigError) as error:
        meet(check=lambda here: check_gpus(here.engine, LOCAL_RANKS), nodes="all", count=4)
    assert str(error.value).startswith(
        f"engine.nodes: node 1 has engine.count(4) / 2 nodes = 2 engines, and rank 2 on {HERE} says: "
        "engine: ranks(2) + engine.count(2) x engine.tensor_parallel(1) = 4 GPUs, but 3 are visible on this machine"
    )


def test_what_goes_wrong_on_a_node_reaches_the_leader(meet: Meet) -> None:
    def check(here: Config) -> None:
        raise ZeroDivisionError("a fault of the program")

    with pytest.raises(ConfigError, match=r"(?s)rank 2 on .* says: Traceback.*ZeroDivisionError: a fault"):
        meet(check=check, nodes=[1])


def test_a_rank_that_says_nothing_is_named(tmp_path: Path) -> None:
    boxes = mailboxes(3)
    introduce(boxes[2], 0)
    with pytest.raises(DapoError, match=r"rank 1 did not say within launch\.join_seconds\(0\.3\)"):
        Nodes(boxes[0], config(tmp_path, nodes="all"), 3, seconds=0.3)
