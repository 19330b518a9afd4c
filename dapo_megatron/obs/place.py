"""How far the record of a run had come, and the way back there: what was written later is made again."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

_WAITING_BYTES = 64 << 20
METRICS, ROLLOUTS, TENSORBOARD = "metrics.jsonl", "rollouts.jsonl", "tensorboard"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stood when a checkpoint was written. The one of a run that begins is `Place()`.

    >>> Place(steps=3, seconds=60.5, files={"metrics.jsonl": 1200, "rollouts.jsonl": 5400}).steps
    3
    """

    steps: int = 0
    """Steps done."""
    seconds: float = 0.0
    """What they took, starting and evaluating included, in all lives of the run."""
    files: dict[str, int] = field(default_factory=dict)
    """File in the run's folder -> bytes that it had."""
    sinks: dict[str, dict[str, str]] = field(default_factory=dict)
    """Sink -> what it takes to go on in the same place (`sinks.Sink.place`)."""


class Lines:
    """A file of lines, which takes some whole or not at all. Those that it did not take are tried again with the next.

    Raises:
        OSError: where it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting = b""
        path.open("ab").close()

    def append(self, text: str) -> None:
        """Add `text`, which ends a line. It is with the system when this returns.

        Raises:
            OSError: where it cannot be written. It is kept for the next time unless that makes more than 64 MiB.
        """
        # Model output may hold halves of surrogate pairs, which have no bytes in UTF-8: JSON spells them \ud83d.
        content = self._waiting + text.encode("utf-8", "backslashreplace")
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("ab") as file:
                file.write(content)
        except OSError:
            with suppress(OSError):  # the first reason is the one to tell
                os.truncate(self._path, size)
            if len(content) <= _WAITING_BYTES:
                self._waiting = content
            raise
        self._waiting = b""


def sizes(folder: Path) -> dict[str, int]:
    """Return file -> bytes of what a record consists of. It is on the disk when this returns, as a checkpoint is.

    Raises:
        OSError: where that cannot be had.
    """
    found = {}
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            found[path.relative_to(folder).as_posix()] = os.fstat(file.fileno()).st_size
    return found


def go_back(folder: Path, files: Mapping[str, int]) -> None:
    """Take the files of a record back to the sizes that `sizes` gave; those that were not there yet are removed.

    A file that somebody has changed meanwhile is kept as far as it goes, with a warning.

    Raises:
        OSError: where that cannot be done.
    """
    there = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for name, path in there.items():
        if name not in files:
            path.unlink()
    for name, size in files.items():
        found = there[name].stat().st_size if name in there else 0
        if found < size:
            log.warning(
                f"{folder / name} has {found:,} bytes, and had {size:,} when the checkpoint was written: somebody has "
                f"changed it, and what is missing stays so; the run goes on after what is there"
            )
        if name in there:
            os.truncate(there[name], min(size, found))
            if name.endswith(".jsonl"):
                _end_line(there[name])


def steps_in(folder: Path) -> int:
    """Return the highest step in metrics.jsonl; 0 without any."""
    path = folder / METRICS
    steps = [0]
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError, KeyError, TypeError):  # the last one may be cut short
            steps.append(int(json.loads(line)["step"]))
    return max(steps)


def _files(folder: Path) -> Iterator[Path]:
    yield from (path for name in (METRICS, ROLLOUTS) if (path := folder / name).is_file())
    yield from sorted((folder / TENSORBOARD).glob("events.out.tfevents.*"))


def _end_line(path: Path) -> None:
    """End a line that is cut short, which happens to a file that was changed: the next one is to be whole."""
    with path.open("rb+") as file:
        if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
            log.warning(f"{path}: its last line is cut short, because somebody has changed the file; it stays so")
            file.write(b"\n")
