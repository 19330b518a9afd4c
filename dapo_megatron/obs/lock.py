"""Keeps two runs out of one folder at once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from dapo_megatron.errors import ConfigError

LOCK = "lock"
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class FolderLock:
    """Holds a folder for this process until `close`, or until the process ends, however it does.

    Between machines it works as far as their file system does that: NFS does, and Lustre where it is mounted with
    `flock`; they may take a minute or two to notice that a machine has died.

    Args:
        folder: is there.

    Raises:
        ConfigError: where another process holds it, with its name.
        OSError: where the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self.works = _take(self._descriptor, folder, fcntl.LOCK_EX)
            """Whether the file system has locks at all."""
            owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": now()}
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(owner).encode() + b"\n", 0)
        except BaseException:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        os.close(self._descriptor)


def check_free(folder: Path) -> None:
    """
    Raises:
        ConfigError: where a run holds the folder.
        OSError: where its lock cannot be looked at.
    """
    with suppress(FileNotFoundError):
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
        try:
            _take(descriptor, folder, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)


def now() -> str:
    """The time for people, in UTC, such as 2026-01-31T12:00:00+00:00."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _take(descriptor: int, folder: Path, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"run: the folder {folder} is in use by {_owner(descriptor)}; wait until that has ended, or choose another "
            f"run.name"
        ) from error
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        return False
    return True


def _owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):  # it is about to write its name
        return "another run"
