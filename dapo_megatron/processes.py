"""Lets processes end together."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

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


def leave(exit_code: int) -> NoReturn:
    """End this process at once. What libraries would do at its exit, such as waiting for other ranks, is left out."""
    with suppress(OSError, ValueError):  # a reader that is gone, a stream that is closed
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
