"""How a run that is asked to stop ends: real processes under the launcher, whose loop trains nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from dapo_megatron.obs.run_folder import AGAIN
from tests.helpers.jobs import ended, job, ranks_of, write_config

pytestmark = [pytest.mark.multiproc, pytest.mark.slow]

Family = Sequence[psutil.Process]
"""The launcher and its ranks."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def saved(config: Path) -> int:
    return len(list((config.parent / "runs").glob("saved*")))


def again(config: Path) -> bool:
    """Whether the run has left word that it is to be started again."""
    return (config.parent / "runs/test" / AGAIN).exists()


@pytest.mark.parametrize(
    ("scene", "act", "code", "says"),
    [
        pytest.param(
            *("rollout", lambda family: [member.terminate() for member in (*family, *family)], 75),
            *("stopped by SIGTERM: saved after 0 steps",),
            id="sigterm_everywhere_and_passed_on",
        ),
        pytest.param(
            *("rollout", lambda family: family[0].send_signal(signal.SIGINT), 130, "interrupted: saved after 0 steps"),
            id="ctrl_c",
            marks=pytest.mark.long,
        ),
        pytest.param(
            *("rollout", lambda family: family[2].send_signal(signal.SIGUSR1), 75, "stopped by SIGUSR1 on rank 1 on "),
            id="sigusr1_elsewhere",
            marks=pytest.mark.long,
        ),
        pytest.param(
            *("update", lambda family: family[1].send_signal(signal.SIGHUP), 75, "stopped by SIGHUP: saved after "),
            id="sighup_in_an_update",
            marks=pytest.mark.long,
        ),
        pytest.param(
            *("update", lambda family: family[2].terminate(), 75, "stopped by SIGTERM on rank 1 on "),
            id="sigterm_in_a_collective",
        ),
    ],
)
def test_a_run_that_is_asked_to_stop_saves(
    config: Path, scene: str, act: Callable[[Family], object], code: int, says: str
) -> None:
    with job(config, scene, module="stop_job") as process:
        ranks = ranks_of(process, config)
        act([psutil.Process(process.pid), *ranks])
        output = ended(process, ranks, timeout=20)
    assert process.returncode == code, output
    assert f"dapo-megatron: {says}" in output.splitlines()[-1], output
    assert ("after 0 steps" in output) == (scene == "rollout")
    assert saved(config) == 2 and "Traceback" not in output
    assert again(config) == (code == 75)


@pytest.mark.long
def test_torchrun_passes_signals_on(config: Path) -> None:
    """It has no exit code for a stop."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--signals-to-handle=SIGUSR1"]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *command, "-m", "tests.helpers.stop_job", "rollout", config],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        ranks = ranks_of(process, config)
        process.send_signal(signal.SIGUSR1)
        output = ended(process, ranks, timeout=20)
    assert process.returncode == 1
    assert saved(config) == 2 and again(config)
    assert "dapo-megatron: stopped by SIGUSR1: saved after 0 steps\n" in output


def test_a_run_that_cannot_save_in_time_ends(config: Path) -> None:
    with job(config, "hang", "checkpoint.signal_seconds=2", module="stop_job") as process:
        ranks = ranks_of(process, config)
        process.terminate()
        output = ended(process, ranks, timeout=20)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert saved(config) == 0 and not again(config)
    said, had, waiting = output.splitlines()[-3:]
    limit = "within checkpoint.signal_seconds(2)"
    assert said == f"dapo-megatron: stopped by SIGTERM: nothing was saved {limit}; the last checkpoint is step 0"
    assert had == "ranks had come to:" and re.fullmatch(r"  rollout, at .*: rank 1 on .*", waiting)


@pytest.mark.long
def test_what_can_be_made_again_does_not_keep_a_run_from_ending(config: Path) -> None:
    with job(config, "left", "checkpoint.signal_seconds=2", module="stop_job") as process:
        ranks = ranks_of(process, config)
        process.terminate()
        output = ended(process, ranks, timeout=20)
    assert process.returncode == 75, output
    assert output.splitlines()[-1] == "dapo-megatron: stopped by SIGTERM: saved after all steps; what is left is hf"
    assert again(config)


@pytest.mark.long
def test_a_run_that_is_over_and_closes_is_over(config: Path) -> None:
    with job(config, "close", module="stop_job") as process:
        ranks = ranks_of(process, config)
        process.terminate()
        output = ended(process, ranks, timeout=20)
    assert process.returncode == 0, output


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_the_second_time_it_ends_at_once(config: Path, number: signal.Signals) -> None:
    with job(config, "hang", module="stop_job") as process:
        ranks = ranks_of(process, config)
        process.send_signal(number)
        time.sleep(2)
        assert all(rank.is_running() for rank in ranks)
        process.send_signal(number)
        output = ended(process, ranks, timeout=8)
    assert process.returncode == 128 + number, output
    because = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM"
    assert output.splitlines()[-1] == f"dapo-megatron: {because} at once; the last checkpoint is step 0"
    assert saved(config) == 0


def test_a_rank_that_was_killed_is_no_request(config: Path) -> None:
    """Although the launcher then sends SIGTERM to the leader, which begins to save."""
    with job(config, "rollout", module="stop_job") as process:
        ranks = ranks_of(process, config)
        ranks[1].kill()
        output = ended(process, ranks, timeout=12)
    assert process.returncode == 1, output
    assert "rank 1 was ended by SIGKILL" in output.splitlines()[-1], output
    assert "error: rank 1 on " in output.splitlines()[-2], output
    assert saved(config) == 0


def test_ranks_whose_launcher_was_killed_end_at_once(config: Path) -> None:
    with job(config, "update", module="stop_job") as process:
        ranks = ranks_of(process, config)
        process.kill()
        _, left = psutil.wait_procs(ranks, timeout=10)
    assert not left
    assert saved(config) == 0


@contextmanager
def alone(config: Path, scene: str, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """A run of one process, without a launcher."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.stop_job", scene, config, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
    ) as process:
        deadline = time.monotonic() + 60
        while not (config.parent / "runs" / "ready0").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield process


@pytest.mark.long
def test_a_run_of_one_process_saves(config: Path) -> None:
    with alone(config, "rollout") as process:
        process.terminate()
        output = ended(process, timeout=20)
    assert process.returncode == 75, output
    assert output.splitlines()[-1] == "dapo-megatron: stopped by SIGTERM: saved after 0 steps"


def test_a_run_stops_before_its_time_is_over(config: Path) -> None:
    with alone(config, "rollout", "run.max_hours=0.007", "checkpoint.signal_seconds=2") as process:
        output = ended(process, timeout=30)
    assert process.returncode == 75, output
    assert output.splitlines()[-1] == "dapo-megatron: stopped before run.max_hours(0.007) is over: saved after 0 steps"
    assert again(config)


@pytest.mark.long
def test_a_run_that_cannot_leave_word_ends_all_the_same(config: Path) -> None:
    with alone(config, "rollout") as process:
        (config.parent / "runs/test" / f".{AGAIN}.unfinished").mkdir()
        process.terminate()
        output = ended(process, timeout=20)
    assert process.returncode == 75, output
    assert output.splitlines()[-1] == "dapo-megatron: stopped by SIGTERM: saved after 0 steps"
    assert "Is a directory" in (config.parent / "runs/test/log.txt").read_text()


@pytest.mark.long
def test_a_run_that_is_done_when_it_is_asked_to_stop_is_done(config: Path) -> None:
    with alone(config, "end") as process:
        process.terminate()
        output = ended(process, timeout=20)
    assert process.returncode == 0 and not again(config), output
