"""The signals that ask a run to end, and how a process listens for them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def heeded() -> list[signal.Signals]:
    """Those of `ASKING` that this process was not started to ignore: SIGHUP under nohup, SIGINT behind a script's &."""
    return [number for number in ASKING if signal.getsignal(number) is not signal.SIG_IGN]


def end_when_interrupted() -> None:
    """Have Ctrl-C end this process at once, with 130, until `raise_when_interrupted`.

    For the time of imports: they leave a traceback of a KeyboardInterrupt, or turn it into an error of another kind.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_when_interrupted() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_when_ended() -> None:
    """Have SIGTERM and SIGHUP, where heeded, raise SystemExit: what is unfinished is removed on the way out."""
    for number in {signal.SIGTERM, signal.SIGHUP} & {*heeded()}:
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"dapo-megatron: interrupted\n")
    os._exit(INTERRUPTED)


class Insistence:
    """Tells a signal that asks from one that insists.

    The first asks; a second SIGTERM, SIGINT or SIGHUP insists. SIGUSR1 is a notice, and never does.

    Args:
        seconds: within which the same signal is the same request: a wrapper passes on what its whole group has got.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._first: tuple[int, float] | None = None

    def insists(self, number: int) -> bool:
        """Return whether this signal, which has just come, is to end the run at once."""
        if number == signal.SIGUSR1:
            return False
        if self._first is None:
            self._first = (number, time.monotonic())
            return False
        first, came = self._first
        return number != first or time.monotonic() - came > self._seconds


def listen(numbers: Iterable[signal.Signals], heard: Callable[[signal.Signals], None]) -> None:
    """Have `heard` called, in a thread of its own, for each of these signals from now on.

    The kernel's handler itself wakes that thread, so that it hears of them while the main thread is in a call that no
    Python handler interrupts: a collective, a wait for the GPU. Called from the main thread.
    """
    wanted = frozenset(numbers)
    ours, handlers = socket.socketpair()
    handlers.setblocking(False)
    signal.set_wakeup_fd(handlers.fileno(), warn_on_full_buffer=False)
    for number in wanted:
        signal.signal(number, _noted)
        signal.siginterrupt(number, False)  # no call of the main thread's, or of a library's, ends early

    def run(_open: socket.socket) -> None:
        while came := ours.recv(4096):
            for number in came:
                if number in wanted:  # any signal with a Python handler is told
                    heard(signal.Signals(number))

    threading.Thread(target=run, args=(handlers,), name="signals", daemon=True).start()


def _noted(number: int, frame: FrameType | None) -> None: ...
