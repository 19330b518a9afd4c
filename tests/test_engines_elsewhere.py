"""Runs on two machines, as far as the network goes: each is in a network namespace of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from dapo_megatron.rollout.token import TOKEN
from examples.quickstart import sums
from examples.quickstart.base import untrained

pytestmark = [pytest.mark.vllm, pytest.mark.multiproc, pytest.mark.long, pytest.mark.timeout(900)]

TRAINER, ENGINES = "10.77.0.1", "10.77.0.2"
CABLE = (f"dapo-a{os.getpid()}"[:15], f"dapo-b{os.getpid()}"[:15])
LIMIT_SECONDS = 400
ASK = """
import sys, urllib.error, urllib.request
for path in sys.argv[2:]:
    try:
        print(urllib.request.urlopen(urllib.request.Request(sys.argv[1] + path, method="POST"), timeout=10).status)
    except urllib.error.HTTPError as error:
        print(error.code)
"""
CONTROL = ("/pause", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them: that of the trainer, and that of the engines."""
    if not shutil.which("ip"):
        pytest.skip("needs `ip` (iproute2)")
    names = (f"dapo-trainer-{os.getpid()}", f"dapo-engines-{os.getpid()}")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1])
            for name, end, address in zip(names, CABLE, (TRAINER, ENGINES), strict=True):
                ip("link", "set", end, "netns", name)
                ip("-n", name, "address", "add", f"{address}/30", "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"cannot make network namespaces, as root can: {error.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def on(machine: str, *words: str) -> list[str]:
    return ["ip", "netns", "exec", machine, sys.executable, *words]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    untrained(seed=0).save_pretrained(tmp_path / "base")
    sums.tokenizer().save_pretrained(tmp_path / "base")
    _, train = sums.split(seed=0, held_out=8, train=64)
    sums.write(tmp_path / "train.jsonl", train)
    values = {
        "model": {"path": str(tmp_path / "base"), "dtype": "float32"},
        "data": {"train": str(tmp_path / "train.jsonl"), "max_prompt_tokens": 16},
        "rollout": {"prompts": 4, "responses": 8, "max_response_tokens": 32, "dynamic_sampling": False},
        "reward": {"overlong": {"cache": 32}, "workers": 1},
        "train": {"steps": 2, "mini_batch": 16, "micro_batch_tokens": 512},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0, "weight_decay": 0.0},
        "run": {"dir": str(tmp_path), "name": "run", "tensorboard": False},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def engines(machines: tuple[str, str], config: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`dapo-megatron engines` on the other machine, and the URL that it prints."""
    values = [f"engine.host={ENGINES}", f"engine.startup_seconds={LIMIT_SECONDS}"]
    command = on(machines[1], "-m", "dapo_megatron", "engines", str(config), *values)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stderr
        url = process.stdout.readline().strip()
        assert re.fullmatch(rf"http://{ENGINES}:\d+", url), process.stderr.read()
        yield process, url
    finally:
        process.terminate()
        process.communicate(timeout=30)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def test_the_engines_of_another_machine_follow_the_run(
    machines: tuple[str, str], config: Path, engines: tuple[subprocess.Popen[str], str]
) -> None:
    process, url = engines
    there = [f"engine.urls=[{url}]", "engine.placement=external", f"engine.startup_seconds={LIMIT_SECONDS}"]
    done = subprocess.run(
        on(machines[0], "-m", "dapo_megatron", "train", str(config), *there),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = rows(config.parent)
    for row in (first, second):
        assert row["mismatch/abs_max"] <= 2e-5
        assert row["grad_norm"] > 0
    assert not (config.parent / "run/engine0.log").exists()

    asked = subprocess.run(on(machines[0], "-c", ASK, url, *CONTROL), capture_output=True, text=True, check=True)
    assert asked.stdout.split() == ["401"] * len(CONTROL), "the trainer's address is not enough"

    token = (config.parent / "run-engines/token").read_text().strip()
    written = [path for path in config.parent.rglob("*") if path.is_file() and path.name != "token"]
    assert any(path.name == "engine0.log" for path in written)
    assert not [path for path in written if token.encode() in path.read_bytes()]
    assert token not in done.stdout + done.stderr

    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - started < 20, errors
    assert token not in errors and TOKEN not in errors


Agents = tuple[subprocess.Popen[str], subprocess.Popen[str]]


@pytest.fixture
def start(machines: tuple[str, str], config: Path) -> Iterator[Callable[..., Agents]]:
    """Starts a run of two nodes, a rank on each machine, and the engine on the second."""
    begun: list[subprocess.Popen[str]] = []

    def begin(*overrides: str) -> Agents:
        for number, machine in enumerate(machines):
            launch = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
            meet = ["--master-addr", TRAINER, "--master-port", "29400"]
            run = ["-m", "dapo_megatron.train", str(config), "engine.nodes=[1]", *overrides]
            begun.append(
                subprocess.Popen(
                    on(machine, "-m", "torch.distributed.run", *launch, *meet, *run),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    start_new_session=True,
                )
            )
        first, second = begun
        return first, second

    yield begin
    for agent in begun:
        if agent.poll() is None:
            for member in (*psutil.Process(agent.pid).children(recursive=True), agent):
                member.kill()
        agent.communicate()


def test_the_first_rank_of_another_node_has_the_engines(config: Path, start: Callable[..., Agents]) -> None:
    first, second = start(f"engine.startup_seconds={LIMIT_SECONDS}", "engine.port=8000")
    output, _ = first.communicate(timeout=LIMIT_SECONDS)
    other, _ = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), output + other
    assert f"on 1 of 2 nodes, on CPU; weights by gloo from {TRAINER}" in output
    assert re.search(rf"node 1, \S+, {re.escape(ENGINES)}: 1 rank, engine 0\n", output), output
    assert f"engine.nodes: engines listen at {ENGINES}: engines answer only" in output
    for row in rows(config.parent):
        assert row["mismatch/abs_max"] <= 2e-5
        assert row["grad_norm"] > 0
    assert len(rows(config.parent)) == 2
    assert f"http://{ENGINES}:8000" in (config.parent / "run/engine0.log").read_text()


def cut(machines: tuple[str, str], agents: Agents) -> None:
    ip("-n", machines[0], "link", "set", CABLE[0], "down")


def kill(number: int) -> Callable[[tuple[str, str], Agents], None]:
    """Kills torchrun and the rank of a machine, as losing it would, and leaves their engines."""

    def do(machines: tuple[str, str], agents: Agents) -> None:
        agent = psutil.Process(agents[number].pid)
        for process in (agent, *agent.children()):
            process.kill()

    return do


@pytest.mark.parametrize(
    ("lose", "left"),
    [
        pytest.param(kill(1), {0: "error: rank 1 on "}, id="the node of the engines"),
        pytest.param(kill(0), {1: "error: the leader, rank 0 on "}, id="the node of the leader"),
        pytest.param(cut, {0: "error: rank 1 on ", 1: "error: the leader, rank 0 on "}, id="the cable"),
    ],
)
def test_a_node_that_is_lost_ends_the_run_within_a_minute_with_the_reason(
    machines: tuple[str, str],
    config: Path,
    start: Callable[..., Agents],
    lose: Callable[[tuple[str, str], Agents], None],
    left: dict[int, str],
) -> None:
    agents = start(f"engine.startup_seconds={LIMIT_SECONDS}", "train.steps=100000", "checkpoint.every=0")
    deadline = time.monotonic() + LIMIT_SECONDS
    while not ((config.parent / "run/metrics.jsonl").exists() and rows(config.parent)):
        assert time.monotonic() < deadline and not any(agent.poll() for agent in agents)
        time.sleep(0.5)
    families = [psutil.Process(agent.pid).children(recursive=True) for agent in agents]
    assert [any("vllm" in " ".join(member.cmdline()) for member in family) for family in families] == [False, True]
    began = time.monotonic()
    lose(machines, agents)
    for number, reason in left.items():
        output, _ = agents[number].communicate(timeout=60)
        assert agents[number].returncode == 1
        assert reason in output and " is lost: " in output, output
    assert time.monotonic() - began < 60
    _, alive = psutil.wait_procs([member for family in families for member in family], timeout=15)
    assert not [member for member in alive if member.status() != psutil.STATUS_ZOMBIE]
