"""Requests to stop, and the signals that make them, in this process."""

from __future__ import annotations

import asyncio
import ctypes
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from dapo_megatron import signals
from dapo_megatron.signals import ASKING, Insistence, heeded, listen
from dapo_megatron.stop import REQUEUE, Stop, StopRequested


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (*ASKING, signal.SIGURG)}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def later(seconds: float, act: object, *arguments: object) -> None:
    threading.Timer(seconds, act, arguments).start()  # pyright: ignore[reportArgumentType]


def test_a_request_waits_for_what_others_take_part_in() -> None:
    stop, done = Stop(), False
    later(0.1, stop.ask, "enough")
    with pytest.raises(StopRequested), stop.interruptible():
        with stop.uninterruptible():
            time.sleep(0.4)
            done = True
        pytest.fail("a request is heard on leaving")
    assert done and stop.reason == "enough"


def test_outside_of_what_can_be_thrown_away_nothing_is_interrupted() -> None:
    stop = Stop()
    stop.ask("enough")
    with stop.uninterruptible():
        pass


def test_a_request_from_a_thread_interrupts_what_can_be_thrown_away() -> None:
    stop = Stop()
    later(0.2, stop.ask, "enough")
    started = time.monotonic()
    with pytest.raises(StopRequested) as raised, stop.interruptible():
        time.sleep(30)
    assert time.monotonic() - started < 5
    assert raised.value.code == REQUEUE == 75
    assert stop.reason == "enough"


def test_a_request_from_a_signal_handler_too() -> None:
    stop = Stop()
    signal.signal(signal.SIGUSR1, lambda number, frame: stop.ask("enough", 3))
    later(0.2, os.kill, os.getpid(), signal.SIGUSR1)
    with pytest.raises(StopRequested) as raised, stop.interruptible():
        time.sleep(30)
    assert raised.value.code == stop.exit_code == 3


def test_elsewhere_a_request_waits_for_the_next_section() -> None:
    stop = Stop()
    stop.ask("enough")
    time.sleep(0.1)
    for _ in range(2):
        with pytest.raises(StopRequested), stop.interruptible():
            raise AssertionError("not to be entered")


def test_only_the_first_request_counts() -> None:
    stop = Stop()
    assert stop.ask("enough") and not stop.ask("more", 1)
    assert (stop.reason, stop.exit_code) == ("enough", REQUEUE)


def test_no_request_is_lost_wherever_it_comes() -> None:
    """One at a random moment around a short section either raises in it, or is seen after it."""
    raised = 0
    for turn in range(200):
        stop = Stop()
        asker = threading.Thread(target=lambda stop=stop, turn=turn: (time.sleep(turn * 1e-5), stop.ask("enough")))
        asker.start()
        try:
            with stop.interruptible():
                time.sleep(0.001)
        except StopRequested:
            raised += 1
        asker.join()
        with pytest.raises(StopRequested), stop.interruptible():
            raise AssertionError("not to be entered")
        assert stop.reason == "enough"
    assert 0 < raised < 200, "some come before its end, some after"


def test_the_section_is_left_undisturbed() -> None:
    stop = Stop()
    left = []
    later(0.2, stop.ask, "enough")
    with pytest.raises(StopRequested), stop.interruptible(), stop.interruptible():
        try:
            time.sleep(30)
        finally:
            stop._wake()  # as where a second thread had asked
            time.sleep(0.1)
            left.append("cleaned up")
    assert left == ["cleaned up"]


def test_what_fails_after_a_request_is_its_consequence() -> None:
    stop = Stop()
    with pytest.raises(ValueError, match="real"), stop.interruptible():
        raise ValueError("real")
    with pytest.raises(StopRequested), stop.interruptible():
        stop._inside = 0  # the request comes while a library swallows exceptions
        stop.ask("enough")
        raise ConnectionError("the engine was ended by the same signal")


def test_it_leaves_an_event_loop_wherever_it_is_raised() -> None:
    async def wait() -> None:
        asyncio.get_running_loop().call_soon(stop.ask, "enough")  # raises in a callback, whose errors a loop keeps
        await asyncio.Event().wait()

    stop = Stop()
    with pytest.raises(StopRequested), stop.interruptible():
        asyncio.run(wait())


def test_the_main_thread_can_be_unwound_anywhere() -> None:
    stop = Stop()
    later(0.2, stop.unwind, 7)
    with pytest.raises(SystemExit) as raised:
        time.sleep(30)
    assert raised.value.code == 7 and not isinstance(raised.value, StopRequested)


def test_the_words_say_what_is_left() -> None:
    stop = Stop()
    stop.ask("interrupted")
    assert stop.words == "interrupted: nothing was saved; there is no checkpoint"
    stop.last_checkpoint = "the last checkpoint is step-4"
    assert stop.words == "interrupted: nothing was saved; the last checkpoint is step-4"
    stop.saved = "saved step-5"
    assert stop.words == "interrupted: saved step-5"


@pytest.mark.parametrize(
    ("came", "insist"),
    [
        ([("TERM", 0.0), ("TERM", 0.5), ("TERM", 1.5)], [False, False, True]),
        ([("INT", 0.0), ("TERM", 0.1)], [False, True]),
        ([("USR1", 0.0), ("USR1", 9.0), ("TERM", 10.0), ("USR1", 12.0), ("TERM", 13.0)], [False] * 4 + [True]),
        ([("HUP", 0.0), ("INT", 5.0)], [False, True]),
    ],
)
def test_who_asks_and_who_insists(
    monkeypatch: pytest.MonkeyPatch, came: list[tuple[str, float]], insist: list[bool]
) -> None:
    insistence, seen = Insistence(1.0), []
    for name, at in came:
        monkeypatch.setattr(signals.time, "monotonic", lambda at=at: at)
        seen.append(insistence.insists(signal.Signals[f"SIG{name}"]))
    assert seen == insist


def test_signals_are_heard_while_the_main_thread_hears_none() -> None:
    heard: queue.SimpleQueue[tuple[signal.Signals, float]] = queue.SimpleQueue()
    listen([signal.SIGUSR1, signal.SIGTERM], lambda number: heard.put((number, time.monotonic())))
    stop = Stop()
    stop._wake()  # has a handler as well, and is nobody's business
    later(0.2, os.kill, os.getpid(), signal.SIGUSR1)
    end, start = os.pipe()
    later(1.0, os.write, start, b"!")
    assert ctypes.CDLL(None).read(end, ctypes.create_string_buffer(1), 1) == 1, "a library's call is not cut short"
    over = time.monotonic()
    number, at = heard.get(timeout=1)
    assert number is signal.SIGUSR1 and over - at > 0.4
    assert heard.empty()


def test_what_this_process_was_started_to_ignore_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert heeded() == [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
