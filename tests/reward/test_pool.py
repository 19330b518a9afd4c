import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dapo_megatron.errors import GradingError
from dapo_megatron.reward.math import Grade
from dapo_megatron.reward.pool import CHUNK, LOST, GradingPool

RIGHT = ("We add.\nAnswer: 34", "34")

# Short answers over which sympy, left alone, spends minutes or all memory.
HANGS = [
    "$2^{2^{40}}$",
    "$10^{10^{9}}$",
    "$(10^{8})!$",
    r"$\binom{10^{9}}{5\cdot 10^{8}}$",
    "$7^{77777777}$",
    r"$\sqrt{10^{10^{8}}+1}$",
    r"$\prod_{n=1}^{10^{7}} n$",
    r"$\frac{1}{3^{3^{20}}}$",
    r"$\sin(10^{10^{7}})$",
    r"$\log(10^{10^{8}})$",
]
# Input that makes a careless parser slow.
NASTY = [
    "1e999999999",
    "$0.1^{10^{10}}$",
    r"$3^{3^{3^{3}}} \bmod 10$",
    "$" + "9" * 200_000 + "$",
    "9" * 3_000_000,
    r"$\{" + ",".join(f"{n}^{{{n}}}" for n in range(1, 300)) + r"\}$",
    "(" * 5000 + "1" + ")" * 5000,
    "$" + r"\frac{1}{" * 60 + "1" + "}" * 60 + "$",
    "1 " * 50_000,
    "$" + r"\sqrt{" * 35 + "2" + "}" * 35 + "$",
    "Answer " * 20_000,
    "$ 1 " * 20_000,
]


def worker_pids(parent: int | None = None) -> set[int]:
    """Find the grading workers that `parent` started (this process by default)."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = stat.read_text().rpartition(")")[2].split()[:2]
            command = stat.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if state != "Z" and int(ppid) == (parent or os.getpid()) and b"dapo_megatron.reward.worker" in command:
            found.add(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_grades_come_in_the_order_of_the_items():
    items = [(f"Answer: {n}", str(n - n % 3)) for n in range(10 * CHUNK + 7)]
    with GradingPool("dapo", workers=2, timeout_seconds=5.0) as pool:
        grades = asyncio.run(pool.grade(items))
    assert grades == [Grade(n % 3 == 0, str(n)) for n in range(len(items))]


def test_serves_many_calls_at_once_and_several_event_loops():
    async def together():
        return await asyncio.gather(*(pool.grade([(f"Answer: {n}", "7")] * 3) for n in range(20)))

    with GradingPool("lenient", workers=2, timeout_seconds=5.0) as pool:
        for _ in range(2):
            assert [[g.correct for g in grades] for grades in asyncio.run(together())] == [
                [n == 7] * 3 for n in range(20)
            ]
        assert asyncio.run(pool.grade([])) == []


def test_any_text_survives_the_pipe():
    texts = ["\ud800", "\x00", "\r\n", "\u2028", '"\\', "Answer: \ud800\u2028"]
    with GradingPool("dapo", workers=1, timeout_seconds=5.0) as pool:
        grades = asyncio.run(pool.grade([(text, "34") for text in texts]))
    assert [grade.extracted for grade in grades] == [None, None, None, None, None, "\ud800\u2028".strip()]
    assert not any(grade.timed_out for grade in grades)


@pytest.mark.parametrize("rule", ["lenient", "math_verify"])
def test_hanging_answers_cost_no_other_answer(rule):
    with GradingPool(rule, workers=2, timeout_seconds=1.0) as pool:
        asyncio.run(pool.grade([RIGHT, RIGHT]))
        before = worker_pids()
        items = [RIGHT] + [item for text in HANGS for item in ((f"Answer: {text}", "34"), RIGHT)]
        grades = asyncio.run(pool.grade(items))
        assert len(before) == len(worker_pids()) == 2
        assert not before & worker_pids()
    assert all(grade.correct for grade in grades[::2])
    assert not any(grade.correct for grade in grades[1::2])
    assert sum(grade == LOST for grade in grades) >= 5
    assert not worker_pids()


@pytest.mark.parametrize("rule", ["dapo", "lenient", "math_verify"])
def test_nasty_input_is_cheap(rule):
    started = time.monotonic()
    with GradingPool(rule, workers=2, timeout_seconds=10.0) as pool:
        grades = asyncio.run(pool.grade([(f"Answer: {text}", "34") for text in NASTY]))
    assert not any(grade.correct or grade.timed_out for grade in grades)
    assert time.monotonic() - started < 10.0


def test_a_worker_killed_while_idle_costs_nothing():
    with GradingPool("dapo", workers=1, timeout_seconds=5.0) as pool:
        assert asyncio.run(pool.grade([RIGHT]))[0].correct
        (pid,) = worker_pids()
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: not alive(pid), 5.0)
        assert asyncio.run(pool.grade([RIGHT, RIGHT])) == [Grade(True, "34")] * 2


def test_a_worker_killed_at_work_costs_one_answer():
    async def kill_amid():
        task = asyncio.create_task(pool.grade([("Answer: $7^{77777777}$", "34"), RIGHT]))
        await asyncio.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
        return await task

    with GradingPool("math_verify", workers=1, timeout_seconds=60.0) as pool:
        asyncio.run(pool.grade([RIGHT]))
        (pid,) = worker_pids()
        assert asyncio.run(kill_amid()) == [LOST, Grade(True, "34")]


def test_a_worker_that_stands_still_is_killed_at_the_limit():
    with GradingPool("dapo", workers=1, timeout_seconds=0.5) as pool:
        asyncio.run(pool.grade([RIGHT]))
        (pid,) = worker_pids()
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        assert asyncio.run(pool.grade([RIGHT] * 12)) == [LOST] + [Grade(True, "34")] * 11
        assert 0.5 <= time.monotonic() - started < 5.0
        assert not alive(pid)


def test_closing_ends_grading_that_is_under_way():
    async def close_amid():
        task = asyncio.create_task(pool.grade([("Answer: $7^{77777777}$", "34")]))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(pool.close)
        return await task

    pool = GradingPool("math_verify", workers=1, timeout_seconds=60.0)
    started = time.monotonic()
    asyncio.run(pool.grade([RIGHT]))
    with pytest.raises(GradingError, match="closed"):
        asyncio.run(close_amid())
    assert not worker_pids()
    assert time.monotonic() - started < 10.0
    pool.close()
    with pytest.raises(GradingError, match="closed"):
        asyncio.run(pool.grade([RIGHT]))


def test_a_worker_that_cannot_start_is_reported(monkeypatch):
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    with (
        GradingPool("dapo", workers=1, timeout_seconds=5.0) as pool,
        pytest.raises(GradingError, match="did not start"),
    ):
        asyncio.run(pool.grade([RIGHT]))


def test_interrupts_are_left_to_the_parent():
    with GradingPool("dapo", workers=1, timeout_seconds=5.0) as pool:
        asyncio.run(pool.grade([RIGHT]))
        (pid,) = worker_pids()
        assert os.getpgid(pid) != os.getpgid(0)
        os.kill(pid, signal.SIGINT)
        assert asyncio.run(pool.grade([RIGHT])) == [Grade(True, "34")]
        assert worker_pids() == {pid}


@pytest.mark.parametrize("answer", ["34", "$7^{77777777}$"], ids=["idle", "hanging"])
def test_workers_die_with_their_parent(answer):
    program = (
        "import asyncio\n"
        "from dapo_megatron.reward.pool import GradingPool\n"
        "pool = GradingPool('math_verify', workers=2, timeout_seconds=1.0)\n"
        "asyncio.run(pool.grade([('Answer: 1', '1')] * 2))\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        f"    asyncio.run(pool.grade([({f'Answer: {answer}'!r}, '34')]))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert parent.stdout
        assert parent.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        pids = worker_pids(parent.pid)
        assert len(pids) == 2
    finally:
        parent.kill()
        parent.communicate()
    assert wait_until(lambda: not any(map(alive, pids)), 5.0)


def test_workers_do_not_import_torch():
    program = "import sys, dapo_megatron.reward.worker, dapo_megatron.reward.pool; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


def test_workers_are_limited_in_memory():
    with GradingPool("dapo", workers=1, timeout_seconds=5.0) as pool:
        asyncio.run(pool.grade([RIGHT]))
        (pid,) = worker_pids()
        limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    (address_space,) = (line.split()[3:5] for line in limits if line.startswith("Max address space"))
    assert address_space == [str(2 << 30)] * 2
