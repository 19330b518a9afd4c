"""How ranks end: real processes under the launcher, which do not train."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from dapo_megatron import rank
from dapo_megatron.errors import EngineError
from dapo_megatron.heartbeat import Failure
from dapo_megatron.obs.lock import LOCK, FolderLock
from dapo_megatron.rank import _Rank
from tests.helpers.checkpoint import write_tokenizer
from tests.helpers.jobs import ended, job, ranks_of, write_config
from tests.helpers.models import save_qwen2

pytestmark = [pytest.mark.multiproc, pytest.mark.slow]


def long(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.long)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


@pytest.mark.parametrize(
    ("scene", "lost", "number", "last"),
    [
        long("python,collective", 0, signal.SIGKILL, "error: rank 0 was ended by SIGKILL"),
        long("python,waiting", 0, signal.SIGSTOP, "error: the leader, rank 0 on "),
        long("python,collective", 0, signal.SIGSTOP, "error: the leader, rank 0 on "),
        ("collective,python", 1, signal.SIGKILL, "error: rank 1 was ended by SIGKILL"),
        long("python,python", 1, signal.SIGSTOP, "error: rank 1 on "),
        ("collective,python", 1, signal.SIGSTOP, "error: rank 1 on "),
    ],
)
def test_a_rank_that_is_gone_ends_the_run(
    config: Path, scene: str, lost: int, number: signal.Signals, last: str
) -> None:
    with job(config, scene) as process:
        family = ranks_of(process, config)
        family[lost].send_signal(number)
        _, late = psutil.wait_procs([rank for rank in family if rank != family[lost]], timeout=15)
        assert not late
        if number == signal.SIGSTOP:
            family[lost].kill()  # as torchrun would, 30 seconds later
        output = ended(process, family)
    assert process.returncode == 1, output
    assert last in output.splitlines()[-1], output
    assert "Traceback" not in output


@pytest.mark.parametrize("scene", ["collective,raise", long("python,raise")])
def test_a_rank_that_fails_is_told_by_the_leader(config: Path, scene: str) -> None:
    with job(config, scene, "parallel.tp=1", ranks=3) as process:
        family = ranks_of(process, config, 3)
        output = ended(process, family, timeout=20)
    assert process.returncode == 1, output
    assert output.count("rank 1 on ") + output.count("rank 2 on ") == 1, output
    assert output.count("Traceback") == 1
    assert output.splitlines()[-1] == "ArithmeticError: the one that matters"


@pytest.mark.parametrize(
    "scene", ["raise,collective", *map(long, ("raise,waiting", "raise,python,fail", "raise,python,hang"))]
)
def test_a_leader_that_fails_says_why_last(config: Path, scene: str) -> None:
    with job(config, scene) as process:
        family = ranks_of(process, config)
        output = ended(process, family, timeout=20)
    assert process.returncode == 1, output
    assert output.splitlines()[-1] == "ArithmeticError: the one that matters"
    assert output.count("Traceback") == 1 and "closing" not in output
    log = (config.parent / "runs/test/log.txt").read_text()
    assert "the one that matters" in log
    assert ("closing failed" in log) == ("fail" in scene)


@pytest.mark.long
def test_a_collective_that_takes_too_long_ends_the_run(config: Path) -> None:
    with job(config, "python,collective", "launch.collective_seconds=3") as process:
        family = ranks_of(process, config)
        output = ended(process, family, timeout=40)
    assert process.returncode == 1
    assert "rank 1 on " in output and "Timed out" in output
    assert "launch.collective_seconds" in output.splitlines()[-3]


@pytest.mark.parametrize("scene", [long("collective,collective,python"), "python,collective,python"])
def test_who_does_not_come_to_a_collective_is_named_by_the_leader(config: Path, scene: str) -> None:
    with job(config, scene, "launch.collective_seconds=3", "parallel.tp=1", ranks=3) as process:
        family = ranks_of(process, config, 3)
        output = ended(process, family, timeout=40)
    assert process.returncode == 1, output
    assert output.count("Traceback") == 1 and "Timed out" in output, "one rank reports it"
    assert "dapo-megatron: rank 1 on " in output, "the leader has more patience, to say so"
    head, *where = output.splitlines()[-3:]
    assert head == "ranks had come to:"
    met, late = sorted(where, key=lambda line: "rank 2 on " in line)
    assert re.fullmatch(r"  checks, in a collective that failed, at dapo_megatron\.rank:\d+: rank 1 on .*", met)
    assert re.fullmatch(r"  checks, at dapo_megatron\.rank:\d+: rank 2 on .*", late)


def test_one_rank_of_a_machine_says_that_the_leader_is_lost(config: Path) -> None:
    with job(config, "python,waiting", "parallel.tp=1", ranks=4) as process:
        leader, *others = ranks_of(process, config, 4)
        leader.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 20
        while not all(map(has_ended, others)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        leader.kill()
        output = ended(process)
    (line,) = (line for line in output.splitlines() if "the leader, rank 0 on " in line)
    assert line.startswith("dapo-megatron: rank 1: error: the leader, rank 0 on ")


def has_ended(rank: psutil.Process) -> bool:
    """Also where the launcher, which waits for the leader, has not looked yet."""
    try:
        return rank.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(
    ("number", "local_rank", "speaks"), [(1, 1, True), (2, 2, False), (8, 0, True), (9, 1, False), (3, 0, True)]
)
def test_the_first_rank_of_a_machine_speaks(
    monkeypatch: pytest.MonkeyPatch, number: int, local_rank: int, speaks: bool
) -> None:
    monkeypatch.setenv("RANK", str(number))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert _Rank()._speaks == speaks


def test_the_quiet_ranks_of_a_machine_do_not_end_the_one_that_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    quiet = _Rank()
    quiet._quiet_seconds = 1.0
    monkeypatch.setattr(rank, "leave", sys.exit)
    waited: list[float] = []
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(SystemExit):
            quiet._follow(Failure("error: the leader is lost", 1))
        waited.append(time.monotonic() - started)
        quiet._signalled.set()  # as torchrun does when it has seen the leader end
    assert waited[0] >= 1.0 > waited[1]
    assert capsys.readouterr().err == ""


@pytest.mark.long
def test_ranks_may_come_later_than_a_collective_may_take(config: Path) -> None:
    with job(config, "end,end,slow", "launch.collective_seconds=3") as process:
        output = ended(process)
    assert process.returncode == 0, output


@pytest.mark.long
def test_ranks_that_come_too_late(config: Path) -> None:
    with job(config, "end,end,slow", "launch.join_seconds=3") as process:
        output = ended(process)
    assert process.returncode == 1, output
    assert "launch.join_seconds(3)" in output.splitlines()[-1]
    assert "Traceback" not in output


def test_a_port_that_is_in_use_is_told_once(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with job(config, "end,end", f"launch.heartbeat_port={port}", ranks=2) as process:
            output = ended(process)
    assert process.returncode == 2, output
    (line,) = output.splitlines()
    assert line.startswith("dapo-megatron: error: launch.heartbeat_port: the leader, on ")


def test_a_job_that_is_ended_while_all_ranks_wait_for_their_gpus(config: Path) -> None:
    """They cannot come to a place where they could save."""
    with job(config, "native,native", "checkpoint.signal_seconds=2") as process:
        family = ranks_of(process, config)
        process.terminate()
        output = ended(process, family, timeout=20)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "dapo-megatron: stopped by SIGTERM: nothing was saved within checkpoint.signal_seconds(2)" in output


def test_a_rank_that_is_lost_before_all_have_come_is_named() -> None:
    """There are no peers yet that could be asked."""
    lost = Failure("error: rank 1 on node7 is lost", 1)
    leader = _Rank()
    leader._heard = lost
    assert leader._cause(SystemExit(143)) is lost


def test_a_rank_that_took_engines_along_is_the_reason_and_not_they(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    lost = Failure("error: rank 1 on node7 is lost", 1)
    leader = _Rank()
    monkeypatch.setattr(leader, "_stop", SimpleNamespace(unwind=lambda code: None))
    leader._said.set()
    threading.Timer(0.3, leader._heard_of, [lost]).start()
    assert leader._cause(EngineError("engine 2 on node7 is gone")) is lost
    assert _Rank()._cause(EngineError("engine 0 hangs")).reason == "error: engine 0 hangs"


def test_an_engine_that_does_not_end_does_not_undo_a_run_that_is_over(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stays() -> None:
        raise EngineError("engine 0 did not end within 10 s; end process 4242 and its children")

    closed: list[str] = []
    leader = _Rank()
    leader._opened.callback(closed.append, "what was opened before")
    leader._opened.callback(stays)
    monkeypatch.setattr(leader, "_begin", lambda *_: (None,) * 4)
    monkeypatch.setattr(leader, "_train", lambda *_: None)
    monkeypatch.setattr("dapo_megatron.rank.listen", lambda *_: None)
    monkeypatch.setattr("dapo_megatron.rank.end_with_parent", lambda: None)
    assert leader.run(config, []) == 0 and closed
    warning = "dapo-megatron: warning: engine 0 did not end within 10 s; end process 4242 and its children\n"
    assert capsys.readouterr().err == warning


def test_input_that_only_the_leader_sees_to_be_wrong_ends_the_run_at_once(config: Path) -> None:
    with job(config, "end,end", "run.dir=/proc/x") as process:
        started = time.monotonic()
        output = ended(process)
    assert process.returncode == 2
    (line,) = output.splitlines()
    assert line.startswith("dapo-megatron: error: run: cannot write to /proc")
    assert time.monotonic() - started < 30


@pytest.mark.long
def test_the_other_ranks_wait_behind_a_leader_that_waits_for_the_lock_of_another_machine(config: Path) -> None:
    folder = config.parent / "runs/test"
    folder.mkdir()
    with closing(FolderLock(folder)):
        (folder / LOCK).write_text(json.dumps({"host": "node7", "pid": 5, "since": "2026-01-31"}))
        with job(config, "end,end", "run.existing=resume", "launch.collective_seconds=2") as process:
            assert process.stdout
            told = next((line for line in process.stdout if "in use" in line), "")
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=6)
            (folder / LOCK).unlink()  # nobody holds the next one
            output = ended(process)
    assert "in use by process 5 on node7, since 2026-01-31" in told and "waiting for up to 180 s" in told
    assert process.returncode == 0 and "in use" not in output, output


def test_a_run_that_is_over_leaves_nothing(config: Path) -> None:
    with job(config, "end,end") as process:
        output = ended(process)
    assert process.returncode == 0, output
    assert "error" not in output and "Traceback" not in output


@pytest.fixture
def trains(config: Path) -> Path:
    """A configuration whose model can be trained."""
    settings = yaml.safe_load(config.read_text())
    settings["model"]["path"] = str(save_qwen2(config.parent / "base", head_dim=32))
    settings["rollout"] |= {"dynamic_sampling": False}
    settings["reward"]["workers"] = 1
    settings["weights"] = {"canary_tolerance": 1e9}  # engines answer at random
    write_tokenizer(config.parent / "base", end_token=True)
    config.write_text(yaml.safe_dump(settings))
    return config


@pytest.mark.long
@pytest.mark.timeout(300)
def test_nothing_that_the_leader_does_alone_has_a_limit(trains: Path) -> None:
    """Start-up, evaluation, rollout, each bucket of a push and each shard take longer than every limit.

    So does reading the checkpoint, where any rank may be the last.
    """
    limits = ["launch.lost_seconds=3", "launch.collective_seconds=3", "train.steps=2", "eval.every=1"]
    with job(trains, "4", *limits, module="slow_leader") as process:
        output = ended(process, timeout=250)
    assert process.returncode == 0, output
    folder = trains.parent / "runs/test"
    log = (folder / "log.txt").read_text()
    assert "buckets of version 2: 6" in log and log.count("a shard of") == 2
    steps = [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert [row["seconds/rollout"] > 3 and row["seconds/publish"] > 9 for row in steps] == [True, True]


@pytest.mark.long
def test_a_run_of_which_only_the_model_is_left_to_write_needs_no_engine(trains: Path) -> None:
    run = trains.parent / "runs/test"

    def life() -> tuple[str, dict[str, bytes]]:
        with job(trains, "0.01", "eval.data=null", "run.existing=resume", module="slow_leader") as process:
            output = ended(process, timeout=100)
        assert process.returncode == 0, output
        assert json.loads((run / "summary.json").read_text())["steps"] == 1
        return (run / "log.txt").read_text(), {path.name: path.read_bytes() for path in (run / "hf").iterdir()}

    first, model = life()
    shutil.rmtree(run / "hf")
    (run / "summary.json").unlink()
    log, again = life()
    assert "phase starting engines" in first and "phase publish" in first
    second = log.removeprefix(first)
    assert "phase saving" in second and "starting engines" not in second and "phase publish" not in second
    assert again == model


def test_an_engine_that_fails_in_the_middle_of_a_push_ends_the_run_at_once(trains: Path) -> None:
    with job(trains, "0", module="slow_leader") as process:
        output = ended(process, timeout=40)
    assert process.returncode == 1, output
    last = output.splitlines()[-1]
    assert last == "dapo-megatron: error: engine 0 broke at bucket 2: no step was done"
    assert "Traceback" not in output
