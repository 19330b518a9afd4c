"""Shows how far a conversion has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from dapo_megatron.units import size

_SECONDS = 10.0
"""Between two lines."""


class Advance(Protocol):
    def __call__(self, nbytes: int, /) -> None: ...


@contextmanager
def progress(file: TextIO, what: str, nbytes: int) -> Iterator[Advance]:
    """Yield what is called with the bytes that have been done since the last call.

    Args:
        nbytes: how many there are in all.
    """
    from rich.console import Console

    console = Console(file=file, highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        yield _Lines(file, what, nbytes)
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), BarColumn(), *columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=nbytes)
        yield lambda done: bar.advance(task, done)


class _Lines:
    def __init__(self, file: TextIO, what: str, nbytes: int) -> None:
        self._file, self._what, self._nbytes = file, what, nbytes
        self._done = 0
        self._begun = self._told = time.monotonic()

    def __call__(self, nbytes: int, /) -> None:
        self._done += nbytes
        now = time.monotonic()
        if now - self._told < _SECONDS or self._done >= self._nbytes:
            return
        self._told = now
        left = (now - self._begun) / self._done * (self._nbytes - self._done)
        print(
            f"{self._what}: {size(self._done)} of {size(self._nbytes)}, {left:.0f} s left",
            file=self._file,
            flush=True,
        )
