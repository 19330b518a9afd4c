"""Text that is safe to show, and a terminal that nothing else writes to."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO


def printable(text: str, limit: int | None = None) -> str:
    """`text` without anything that a terminal obeys: escape sequences, controls, marks that reverse the direction.

    Each such character is spelled as Python does (`\\x1b`); new lines stay. Of a text longer than `limit` characters,
    the end is shown: there is the answer.
    """
    if limit is not None and len(text) > limit:
        text = "..." + text[len(text) - limit :]
    return "".join(char if char.isprintable() or char == "\n" else _spelled(char) for char in text)


def _ends_within_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        return file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"


def _spelled(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


class Diverted:
    """While open, what this process writes to standard output and error goes to `log`.

    C++ libraries and child processes are included; log records and Python warnings get a time. `terminal` is what
    standard output was. A last line of `log` that was cut short, by a kill, is ended before anything is written.
    """

    def __init__(self, log: Path) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._saved = (os.dup(1), os.dup(2))
        encoding = getattr(sys.__stdout__, "encoding", None) or "utf-8"
        self.terminal: TextIO = os.fdopen(os.dup(1), "w", encoding=encoding, errors="backslashreplace")
        self._log = log.open("a", encoding="utf-8", errors="backslashreplace")
        if _ends_within_a_line(log):
            self.note("")
        for descriptor in (1, 2):
            os.dup2(self._log.fileno(), descriptor)
        self._handler = logging.StreamHandler(self._log)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(self._handler)
        logging.captureWarnings(True)

    def note(self, text: str) -> None:
        """Write a line to the log only. Where the disk is full, it is not there."""
        with suppress(OSError):
            self._log.write(text + "\n")
            self._log.flush()

    def last_words(self, text: str) -> None:
        """Write to what standard error was, and give nothing back: what comes later goes to the log for good."""
        over = self._log.closed
        with suppress(OSError), os.fdopen(os.dup(2 if over else self._saved[1]), "w", errors="replace") as terminal:
            terminal.write(text + "\n")
        if over:
            return
        self.note(text)
        for saved in self._saved:
            os.dup2(self._log.fileno(), saved)

    def close(self) -> None:
        """Give standard output and error back. Safe to call twice."""
        if self._log.closed:
            return
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(self._handler)
        for descriptor, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, descriptor)
            os.close(saved)
        for file in (self.terminal, self._log):
            with suppress(OSError):
                file.close()
