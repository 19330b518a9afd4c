"""Lets processes end together."""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent dies, however it dies. Linux only; else nothing."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, instead of init. Linux only; else nothing."""
    if sys.platform == "linux":
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def outlive_output() -> None:
    """From now on, what standard output and error do not take is lost, and no error of whoever prints.

    A disk may be full, or a terminal gone, and any library prints.
    """
    streams = []
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        with suppress(OSError, ValueError):
            stream.flush()
        raw = io.BufferedWriter(_Losing(descriptor, "w", closefd=False))
        streams.append(io.TextIOWrapper(raw, stream.encoding, errors="backslashreplace", line_buffering=True))
    sys.stdout, sys.stderr = streams


class _Losing(io.FileIO):
    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError:
            return memoryview(content).nbytes


def leave(exit_code: int) -> NoReturn:
    """End this process at once. What libraries would do at its exit, such as waiting for other ranks, is left out."""
    with suppress(OSError, ValueError):  # a reader that is gone, a stream that is closed
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
