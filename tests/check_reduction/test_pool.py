from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing

import psutil
import pytest

from dapo_megatron.check_reduction.pool import RankError, RankPool

pytestmark = pytest.mark.multiproc


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with closing(RankPool()) as pool:
        yield pool


def _where(shift: int) -> tuple[int, int, str]:
    return shift + int(os.environ["RANK"]), os.getpid(), os.environ["WORLD_SIZE"]


def _fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise KeyError("the one that matters")
    time.sleep(60)


def _die_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def test_answers_come_by_rank_from_processes_that_stay(pool: RankPool) -> None:
    (first, first_pid, world), (second, second_pid, _) = pool.run(2, _where, 5, timeout=60)
    assert (first, second, world) == (5, 6, "2")
    assert first_pid != second_pid
    assert pool.run(1, _where, 7, timeout=60) == [(7, first_pid, "1")]


def test_processes_are_replaced_after_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dapo_megatron.check_reduction.pool.RUNS", 2)
    with closing(RankPool()) as pool:
        first, second, third = (pool.run(1, _where, 0, timeout=60)[0][1] for _ in range(3))
    assert first == second != third


def test_a_failing_rank_is_shown_and_the_others_do_not_hold_it_up(pool: RankPool) -> None:
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 failed: Trace(.|\n)*the one that matters(.|\n)*ranks \[0\] had not"):
        pool.run(2, _fail_on_rank_1, timeout=50)
    assert time.monotonic() - begin < 40


def _fail_one_after_the_other() -> None:
    time.sleep(1 - int(os.environ["RANK"]))
    raise ConnectionError(f"rank {os.environ['RANK']} says")


def test_of_failures_the_first_is_shown_whole(pool: RankPool) -> None:
    with pytest.raises(RankError) as error:
        pool.run(2, _fail_one_after_the_other, timeout=50)
    first, second = str(error.value).split("rank 0 failed: ")
    assert first.startswith("rank 1 failed: Traceback") and "rank 1 says" in first
    assert second == "ConnectionError: rank 0 says"


def test_a_dead_rank_is_said_and_the_next_call_has_new_ones(pool: RankPool) -> None:
    with pytest.raises(RankError, match="rank 1 failed: it died"):
        pool.run(2, _die_on_rank_1, timeout=50)
    assert [answer for answer, _, _ in pool.run(2, _where, 0, timeout=60)] == [0, 1]


def test_a_rank_that_died_between_two_calls_is_said(pool: RankPool) -> None:
    _, second = pool.run(2, _where, 0, timeout=60)
    os.kill(second[1], signal.SIGKILL)
    with pytest.raises(RankError, match="died"):
        pool.run(2, _where, 0, timeout=60)
    assert len(pool.run(2, _where, 0, timeout=60)) == 2


PROGRAM = """
import os, signal, time
from threading import Thread
import psutil
from dapo_megatron.check_reduction.pool import RankPool

if __name__ == "__main__":
    pool = RankPool()
    pool.run(2, int, timeout=100)
    Thread(target=lambda: pool.run(2, time.sleep, 100, timeout=100), daemon=True).start()
    time.sleep(0.5)
    print(*(process.pid for process in psutil.Process().children(recursive=True)), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_ranks_end_with_the_process_that_uses_them() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL and len(pids) >= 2, done.stderr
    _, left = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20)
    assert not left, [process.cmdline() for process in left]


class _AwkwardError(Exception):
    """Cannot be unpickled: that would call it with its text alone."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def _raise_awkwardly() -> None:
    raise _AwkwardError(1, 2)


def test_an_exception_that_cannot_be_pickled_is_shown(pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"rank 0 failed: Traceback(.|\n)*_AwkwardError: 1 and 2"):
        pool.run(1, _raise_awkwardly, timeout=50)


def test_ranks_that_hang_are_said_with_the_seconds(pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"ranks \[0, 1\] had not answered after 2 s"):
        pool.run(2, time.sleep, 60, timeout=2)
