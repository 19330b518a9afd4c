"""Keeps two runs out of one folder at once."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from dapo_megatron.errors import ConfigError

log = logging.getLogger(__name__)

LOCK = "lock"
PATIENCE_SECONDS = 180.0
"""For a file system to notice that the machine that held a lock has died: the leases of NFSv4, and Lustre before it
evicts a client, last 90 seconds and more."""
_LOOK_SECONDS = 2.0
"""From one look at a lock that is waited for to the next."""
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class FolderLock:
    """Holds a folder for this process until `close`, or until the process ends, however it does.

    Between machines it works as far as their file system does that: NFS does, and Lustre where it is mounted with
    `flock`; they may take a minute or two to notice that a machine has died (`wait_until_free`).

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
            os.fsync(self._descriptor)  # the name is wanted once this machine has died
        except BaseException:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        os.close(self._descriptor)


def hold(folder: Path, key: str, tell: Callable[[str], object]) -> FolderLock:
    """Hold a folder, which is made where it is not there.

    Args:
        key: of the configuration, which names it.
        tell: is given a line where the file system has no locks.

    Raises:
        ConfigError: where another process holds it, or it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder)
    except OSError as error:
        raise ConfigError(f"{key}: cannot use the folder {folder}: {error.strerror}") from error
    if not lock.works:
        tell(f"{key}: the file system of {folder} has no locks: see that no two runs use this folder")
    return lock


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


def wait_until_free(folder: Path) -> None:
    """`check_free`, with patience where the one who holds the folder is on another machine, which may have died.

    Raises:
        ConfigError: where a run on this machine holds it, at once; else where one still does after PATIENCE_SECONDS.
        OSError: where its lock cannot be looked at.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    told = False
    while True:
        try:
            check_free(folder)
        except _InUseError as error:
            if error.host in (None, socket.gethostname()) or time.monotonic() >= deadline:
                raise
            if not told:
                log.warning(
                    f"the folder {folder} is in use by {error.owner}; if that machine has died, its lock goes in a "
                    f"minute or two: waiting for up to {PATIENCE_SECONDS:g} s"
                )
                told = True
            time.sleep(_LOOK_SECONDS)
        else:
            return


def now() -> str:
    """The time for people, in UTC, such as 2026-01-31T12:00:00+00:00."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class _InUseError(ConfigError):
    """
    Args:
        host: of the process that holds the folder; None where that is not known.
        owner: the process, for people.
    """

    def __init__(self, folder: Path, host: str | None, owner: str) -> None:
        self.host, self.owner = host, owner
        super().__init__(
            f"run: the folder {folder} is in use by {owner}; wait until that has ended, or choose another run.name"
        )


def _take(descriptor: int, folder: Path, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _InUseError(folder, *_owner(descriptor)) from error
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        return False
    return True


def _owner(descriptor: int) -> tuple[str | None, str]:
    """The host of who holds the lock, where it is known, and its name for people."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return owner["host"], f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):  # it is about to write its name
        return None, "another run"
