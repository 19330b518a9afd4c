"""Ranks that keep in touch: threads of this process, and processes where one is stopped or killed."""

from __future__ import annotations

import json
import logging
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from dapo_megatron.errors import ConfigError, DapoError
from dapo_megatron.heartbeat import SETTLE_SECONDS, Failure, Peers, join, leader
from dapo_megatron.heartbeat.watch import _place
from dapo_megatron.processes import leave

LOST_SECONDS = 1.5
HERE = socket.gethostname()
Failures = queue.SimpleQueue[Failure]


class Board:
    """A store for threads and processes: a folder with a file for each key."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def set(self, key: str, value: str) -> None:
        (self._folder / f"{key}.new").write_text(value)
        (self._folder / f"{key}.new").rename(self._folder / key)

    def get(self, key: str) -> bytes:
        while not (self._folder / key).exists():
            time.sleep(0.01)
        return (self._folder / key).read_bytes()


def ignore(failure: Failure) -> None: ...


def joined(
    folder: Path,
    rank: int,
    ranks: int,
    on_failure: Callable[[Failure], None],
    *,
    address: str | None = None,
    port: int | None = None,
    on_stop: Callable[[str, str], None] | None = None,
) -> Peers:
    on_stop = on_stop or (lambda signal_name, rank_name: None)
    limits = {"lost_seconds": LOST_SECONDS, "join_seconds": 20.0}
    return join(Board(folder), rank, ranks, on_failure, on_stop, address=address, port=port, **limits)


@pytest.fixture
def three(tmp_path: Path) -> Iterator[tuple[list[Peers], list[Failures]]]:
    """The leader and two others in this process, and what each of them hears of failures."""
    failures: list[Failures] = [queue.SimpleQueue() for _ in range(3)]
    before = threading.active_count()
    with ExitStack() as stack:
        with ThreadPoolExecutor(3) as pool:
            members = [pool.submit(joined, tmp_path, rank, 3, failures[rank].put) for rank in range(3)]
        yield [stack.enter_context(closing(member.result())) for member in members], failures
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before, "no thread is left"


Three = tuple[list[Peers], list[Failures]]


def test_a_run_of_one_process_waits_for_nobody() -> None:
    peers = join(Board(Path()), 0, 1, ignore, print, address=None, lost_seconds=1, join_seconds=1)
    peers.after_leader("rollout")
    peers.together("weights")
    assert peers.failure() is None and peers.whereabouts() == ""
    assert not peers.tell(Failure("error: x", 1))
    peers.close()


def test_the_others_wait_for_the_leader_longer_than_the_time_after_which_a_rank_is_lost(three: Three) -> None:
    (leader, *others), failures = three
    came: Failures = queue.SimpleQueue()

    def follow(peers: Peers) -> None:
        peers.after_leader("rollout")
        peers.after_leader("bucket")
        came.put(Failure("came", 0))

    threads = [threading.Thread(target=follow, args=(peers,), daemon=True) for peers in others]
    for thread in threads:
        thread.start()
    leader.after_leader("rollout")  # it may be ahead, too
    time.sleep(2 * LOST_SECONDS)
    assert came.empty() and all(failure.empty() for failure in failures)
    leader.after_leader("bucket")
    for thread in threads:
        thread.join(5)
    assert came.qsize() == 2


def test_what_the_leader_says_reaches_all(three: Three) -> None:
    (leader, *others), _ = three
    for value in (True, False, None, {"step": 4}):
        assert leader.leader_says("stop", value) == value
        assert [peers.leader_says("stop", "what others give does not matter") for peers in others] == [value] * 2
    assert Peers().leader_says("stop", True) is True


def test_letters_go_to_one_rank_and_the_last_is_none(three: Three) -> None:
    (leader, first, second), _ = three
    first.post(0, {"a": 1})
    assert leader.letters.get(timeout=5) == (1, {"a": 1})
    leader.post(2, long := {"b": "x" * 90_000})
    assert second.letters.get(timeout=5) == (0, long) and first.letters.empty()
    second.post(0, [2])
    second.close()
    assert [leader.letters.get(timeout=5) for _ in range(2)] == [(2, [2]), (2, None)]
    assert second.letters.get(timeout=5) == (0, None)
    leader.close()
    assert first.letters.get(timeout=5) == (0, None) and leader.letters.get(timeout=5) == (1, None)
    leader.post(1, {"c": 1})  # to nobody
    assert first.letters.empty()


def test_a_rank_that_was_asked_to_end_tells_the_leader(tmp_path: Path) -> None:
    told: queue.SimpleQueue[tuple[str, ...]] = queue.SimpleQueue()
    with ThreadPoolExecutor(2) as pool:
        hear = lambda *names: told.put(names)  # noqa: E731
        leader, other = pool.map(lambda rank: joined(tmp_path, rank, 2, ignore, on_stop=hear), range(2))
    with closing(other):
        with closing(leader):
            assert other.pass_on("SIGTERM")
            assert told.get(timeout=5) == ("SIGTERM", f"rank 1 on {HERE}")
        deadline = time.monotonic() + 5
        while other.pass_on("SIGTERM"):
            assert time.monotonic() < deadline, "the leader has left, and will not end this rank"
            time.sleep(0.05)
    assert not other.pass_on("SIGTERM") and not Peers().pass_on("SIGTERM")


def test_a_rank_whose_leader_is_lost_waits_for_what_will_be_said(tmp_path: Path) -> None:
    failures: Failures = queue.SimpleQueue()
    with ThreadPoolExecutor(2) as pool:
        leader, other = pool.map(lambda rank: joined(tmp_path, rank, 2, failures.put), range(2))
    with closing(leader), closing(other):
        leader._links[0].writer.transport.abort()  # pyright: ignore[reportAttributeAccessIssue]
        time.sleep(SETTLE_SECONDS / 2)
        assert other.pass_on("SIGTERM")
        assert "is lost: its connection broke off" in failures.get(timeout=5).reason


def test_other_calls_than_the_leaders_are_an_error(three: Three) -> None:
    (leader, first, _), _ = three
    leader.after_leader("rollout")
    with pytest.raises(RuntimeError, match="the leader has come to 'rollout', this one to 'bucket'"):
        first.after_leader("bucket")


def test_all_ranks_wait_for_the_last_and_the_log_says_for_whom(
    three: Three, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leader, "_REMIND_SECONDS", 0.5)
    caplog.set_level(logging.WARNING)
    everyone, failures = three
    with ThreadPoolExecutor(3) as pool:
        for turn in range(2):
            early = [pool.submit(peers.together, f"weights {turn}") for peers in everyone[:2]]
            time.sleep(2 * LOST_SECONDS)  # it has no limit
            assert not any(call.done() for call in early)
            for call in (*early, pool.submit(everyone[2].together, f"weights {turn}")):
                call.result(5)
        # In between, the others may go on to wait for the leader.
        for call in [pool.submit(peers.after_leader, "rollout") for peers in everyone]:
            call.result(5)
    assert all(failure.empty() for failure in failures)
    assert caplog.messages[-1] == f"1 of 2 ranks have yet to come to: weights 1: rank 2 on {HERE}"
    assert len(caplog.messages) == 4, "after 0.5 and 1.5 of 3 seconds each"


def test_a_leader_that_waits_for_all_hears_of_a_failure(tmp_path: Path) -> None:
    """Its main thread is woken up by a signal, as `rank` sends it."""
    program = "from tests.test_heartbeat import wait_for_all; wait_for_all(__import__('sys').argv[1])"
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "joined\n"
        process.terminate()
        assert process.wait(5) == 128 + signal.SIGTERM


def wait_for_all(folder: str) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: leave(128 + number))
    with ThreadPoolExecutor(2) as pool:
        peers, _ = (pool.submit(joined, Path(folder), rank, 2, ignore) for rank in range(2))
        first = peers.result()
    print("joined", flush=True)
    first.together("weights")


def test_other_calls_than_the_leaders_are_an_error_where_all_wait(three: Three) -> None:
    (leader, first, _), _ = three
    threading.Thread(target=first.together, args=("weights",), daemon=True).start()
    with pytest.raises(RuntimeError, match=r"rank 1 on .* has come to 'weights', the leader to 'end'"):
        leader.together("end")
    leader.after_leader("weights")  # lets it go


def test_a_failure_reaches_the_leader_with_its_reason_and_the_others_without(three: Three) -> None:
    (leader, first, second), (at_leader, at_first, at_second) = three
    long = "error: " + "\ud83d\n" * 60_000
    threading.Thread(target=first.tell, args=(Failure(long, 7),), daemon=True).start()
    heard = at_leader.get(timeout=10)
    assert heard.exit_code == 7
    assert heard.reason.startswith(f"rank 1 on {HERE}: ") and heard.reason.endswith(long[-10_000:])
    assert leader.failure() == heard
    assert at_first.empty() and at_second.empty(), "the leader speaks first"
    leader.tell(heard)
    assert at_first.get(timeout=5) == at_second.get(timeout=5) == Failure("", 7)
    assert second.failure() == Failure("", 7)


def test_who_fails_does_not_leave_before_the_leader_has_answered(three: Three) -> None:
    (leader, first, _), (at_leader, *_) = three
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(first.tell, Failure("error: x", 1))
        failure = at_leader.get(timeout=10)
        assert not told.done()
        leader.tell(failure)
        assert told.result(5)


def test_ranks_that_leave_are_not_missed(three: Three) -> None:
    (leader, *others), failures = three
    for peers in (others[0], leader, others[1]):
        peers.close()
        time.sleep(SETTLE_SECONDS + 0.5)
    assert all(failure.empty() for failure in failures)


def test_a_stranger_is_not_let_in(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(joined, tmp_path, 0, 2, ignore)
        place = json.loads(Board(tmp_path).get("heartbeat"))
        for hello in ({"rank": 1, "host": "x", "token": "x"}, {"rank": 1}, [], "x" * 300_000):
            with socket.create_connection(("127.0.0.1", place["port"]), timeout=5) as stranger:
                stranger.sendall(json.dumps(hello).encode() + b"\n")
                with suppress(ConnectionResetError):
                    assert stranger.recv(100) == b""
        assert not leader.done()
        member = pool.submit(joined, tmp_path, 1, 2, ignore)
        for peers in (member, leader):
            peers.result(10).close()


def test_ranks_of_several_machines_find_the_leader_by_its_address_and_wait_for_the_last(tmp_path: Path) -> None:
    failures: Failures = queue.SimpleQueue()
    with ThreadPoolExecutor(3) as pool:
        early = [pool.submit(joined, tmp_path, rank, 3, failures.put, address="localhost") for rank in range(2)]
        time.sleep(2 * LOST_SECONDS + SETTLE_SECONDS)
        assert not early[0].done() and early[1].done()
        for member in (*early, pool.submit(joined, tmp_path, 2, 3, failures.put)):
            member.result(10).close()
    assert failures.empty()


def test_a_port_can_be_chosen(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(joined, tmp_path, 1, 2, ignore)
            message = rf"^launch\.heartbeat_port: the leader, on {HERE}, cannot listen on port {port}: Address already"
            with pytest.raises(ConfigError, match=message):
                joined(tmp_path, 0, 2, ignore, port=port)
            with pytest.raises(SystemExit) as left:
                waiting.result(5)
            assert left.value.code == 2, "the leader says why"
    (tmp_path / "heartbeat").unlink()
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(joined, tmp_path, rank, 2, ignore, address="localhost", port=port) for rank in range(2)]
        assert json.loads(Board(tmp_path).get("heartbeat"))["port"] == port
        for member in both:
            member.result(10).close()


def test_ranks_that_do_not_come_are_named(tmp_path: Path) -> None:
    failures: Failures = queue.SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(joined, tmp_path, 1, 3, failures.put)
        with pytest.raises(DapoError, match=r"ranks \[2\] of 3 did not come within launch.join_seconds\(1\)"):
            join(Board(tmp_path), 0, 3, ignore, print, address=None, lost_seconds=1, join_seconds=1)
        with closing(early.result()):
            assert failures.get(timeout=5) == Failure("", 1), "it does not wait for ever"


def member(folder: str, rank: str, ranks: str) -> None:
    """A rank in a process: it prints a line once it has joined, and the failure that it hears of.

    Those after the second wait for all others, in vain.
    """

    def say(failure: Failure) -> None:
        where = peers.whereabouts() if failure.late else ""
        print(json.dumps([failure.reason + where, failure.exit_code, failure.late]), flush=True)

    peers = joined(Path(folder), int(rank), int(ranks), say)
    peers.after_leader("rollout")
    print("joined", flush=True)
    if int(rank) >= 2:
        peers.together("weights")
    time.sleep(60)


@contextmanager
def processes(folder: Path, count: int) -> Iterator[Sequence[subprocess.Popen[str]]]:
    program = "import sys; from tests.test_heartbeat import member; member(*sys.argv[1:])"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, folder, str(rank), str(count)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    try:
        for rank in ranks:
            assert rank.stdout and rank.stdout.readline() == "joined\n"
        time.sleep(LOST_SECONDS / 3)  # for a beat
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Sequence[subprocess.Popen[str]]]:
    """Two ranks in processes."""
    with processes(tmp_path, 2) as ranks:
        yield ranks


def heard(rank: subprocess.Popen[str]) -> Failure:
    assert rank.stdout
    return Failure(*json.loads(rank.stdout.readline()))


def test_ranks_that_are_lost_together_are_all_named_and_who_is_late_stands_out(tmp_path: Path) -> None:
    """As when a collective is given up by all but the rank that never came to it."""
    with processes(tmp_path, 5) as ranks:
        for lost in (3, 4, 2):
            ranks[lost].kill()
            time.sleep(SETTLE_SECONDS / 8)
        failure = heard(ranks[0])
    first, had, late, waiting = failure.reason.splitlines()
    in_order = ", ".join(f"rank {rank} on {HERE} (its connection broke off)" for rank in (3, 4, 2))
    assert first == f"error: 3 ranks are lost, in this order: {in_order}"
    assert (had, late) == ("ranks had come to:", f"  rollout: rank 1 on {HERE}")
    assert waiting.startswith("  waiting for all ranks to come to: weights: rank ") and waiting.count(HERE) == 3
    assert failure.exit_code == 1


def test_a_beat_says_where_in_this_package_the_main_thread_is() -> None:
    """Not in which wait of the heartbeat's own, or of a library's."""
    assert _place() == ""
    below = {"__name__": "torch.distributed", "place": _place}
    above = {"__name__": "dapo_megatron.actor.reduce", "below": below, "call": "seen = place()"}
    exec("\n\nexec(call, below)", above)
    assert below["seen"] == ", at dapo_megatron.actor.reduce:3"


@pytest.mark.parametrize(
    ("number", "how"),
    [(signal.SIGKILL, "its connection broke off"), (signal.SIGSTOP, "nothing was heard from it for")],
    ids=["killed", "stopped"],
)
@pytest.mark.parametrize("lost", [0, 1], ids=["leader", "other"])
def test_a_rank_that_is_gone_is_missed(
    pair: Sequence[subprocess.Popen[str]], lost: int, number: signal.Signals, how: str
) -> None:
    started = time.monotonic()
    pair[lost].send_signal(number)
    failure = heard(pair[1 - lost])
    name = f"rank 1 on {HERE}" if lost else f"the leader, rank 0 on {HERE},"
    assert failure.reason.startswith(f"error: {name} is lost: {how}")
    assert failure.reason.endswith("it had come to: rollout")
    assert failure.exit_code == 1
    assert time.monotonic() - started < 3 * LOST_SECONDS


def test_ranks_that_were_all_stopped_go_on(pair: Sequence[subprocess.Popen[str]]) -> None:
    """As when a machine was suspended; it may be resumed by and by."""
    for rank in pair:
        rank.send_signal(signal.SIGSTOP)
    time.sleep(2 * LOST_SECONDS)
    for rank in pair:
        time.sleep(LOST_SECONDS / 4)
        rank.send_signal(signal.SIGCONT)
    time.sleep(2 * LOST_SECONDS)
    for rank in pair:
        rank.kill()
        assert rank.communicate()[0] == ""
