"""A run and its engines on two machines, as far as the network goes: each is in a network namespace of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dapo_megatron.rollout.token import TOKEN
from examples.quickstart import sums
from examples.quickstart.base import untrained

pytestmark = [pytest.mark.vllm, pytest.mark.multiproc, pytest.mark.long, pytest.mark.timeout(900)]

TRAINER, ENGINES = "10.77.0.1", "10.77.0.2"
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
    cable = (f"dapo-a{os.getpid()}"[:15], f"dapo-b{os.getpid()}"[:15])
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
            for name, end, address in zip(names, cable, (TRAINER, ENGINES), strict=True):
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
