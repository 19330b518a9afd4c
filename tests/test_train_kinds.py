"""A whole run with a vLLM and an SGLang, which run already: both get the weights, and both are asked."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.sglang import STARTUP_SECONDS, needs_sglang
from tests.test_train import command, rows, write_material
from tests.test_train_engines import FOUR_RANKS, assert_engines_follow

pytestmark = [
    *needs_sglang,
    *(pytest.mark.vllm, pytest.mark.multiproc, pytest.mark.long, pytest.mark.timeout(STARTUP_SECONDS + 600)),
]

KINDS = ("vllm", "sglang")


@pytest.fixture
def train(tmp_path: Path) -> list[str]:
    """The command line of the run."""
    # A rollout's prompts are shared out: each engine gets more than it needs at a time from half of them.
    few = ["engine.max_sequences=8", "rollout.prompts=8", "train.mini_batch=32", "engine.stall_seconds=240"]
    return command(write_material(tmp_path / "material"), tmp_path, *few, *FOUR_RANKS)


@pytest.fixture
def urls(train: list[str]) -> Iterator[list[str]]:
    """Of an engine of each kind, one after the other: starting takes all cores."""
    started: list[subprocess.Popen[str]] = []
    found: list[str] = []
    try:
        for kind in KINDS:
            words = [
                *train[:3],
                "engines",
                *train[4:],
                f"engine.kind={kind}",
                f"engine.startup_seconds={STARTUP_SECONDS}",
            ]
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            started.append(process)
            assert process.stdout and process.stderr
            found.append(process.stdout.readline().strip())
            assert found[-1], process.stderr.read()
        yield found
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.communicate(timeout=60)


def test_engines_of_both_kinds_follow_the_run(tmp_path: Path, train: list[str], urls: list[str]) -> None:
    there = ["engine.placement=external", f"engine.urls={json.dumps(urls)}", f"engine.kinds={json.dumps(KINDS)}"]
    done = subprocess.run([*train, *there], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"engine 1: {urls[1]}, sglang" in done.stdout
    assert_engines_follow(tmp_path)
    assert all(row["engine/tokens_per_second_min"] > 0 for row in rows(tmp_path)), "both have written"

    swapped = [
        f"engine.kinds={json.dumps(KINDS[::-1])}",
        "run.name=swapped",
        f"engine.token_file={tmp_path}/run-engines/token",
    ]
    done = subprocess.run([*train, *there, *swapped], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    says = r"is no engine for this run: engine\.kind is (vllm, and sglang|sglang, and vllm) in this run"
    assert re.search(says, done.stderr), done.stderr
