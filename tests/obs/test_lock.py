from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from dapo_megatron.errors import ConfigError
from dapo_megatron.obs.lock import LOCK, FolderLock, check_free
from dapo_megatron.obs.run_folder import check_run_folder, open_run_folder
from tests.obs.test_run_folder import config

HOLD = (
    "import sys, time; from pathlib import Path; from dapo_megatron.obs.lock import FolderLock\n"
    "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout and holder.stdout.readline() == "held\n"
            reason = (
                rf"{tmp_path} is in use by process {holder.pid} on {re.escape(socket.gethostname())}, since 20\S+; "
                rf"wait until that has ended, or choose another run\.name"
            )
            for attempt in (check_free, FolderLock):
                with pytest.raises(ConfigError, match=reason):
                    attempt(tmp_path)
        finally:
            holder.kill()
    check_free(tmp_path)
    FolderLock(tmp_path).close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, which lists the open files")
def test_a_lock_that_is_refused_leaves_no_file_open(tmp_path: Path) -> None:
    with closing(FolderLock(tmp_path)):
        before = os.listdir("/proc/self/fd")
        with pytest.raises(ConfigError, match="in use"):
            FolderLock(tmp_path)
        assert len(os.listdir("/proc/self/fd")) == len(before)


def test_looking_at_a_lock_neither_makes_nor_takes_it(tmp_path: Path) -> None:
    check_free(tmp_path)
    assert not list(tmp_path.iterdir())
    with closing(FolderLock(tmp_path)), pytest.raises(ConfigError, match=f"in use by process {os.getpid()} "):
        check_free(tmp_path)
    check_free(tmp_path)


@pytest.mark.parametrize("existing", ["rename", "resume"])
def test_a_run_that_goes_is_neither_joined_nor_moved(tmp_path: Path, existing: str) -> None:
    with closing(open_run_folder(config(tmp_path))) as run:
        for attempt in (check_run_folder, open_run_folder):
            with pytest.raises(ConfigError, match="runs/test is in use by process"):
                attempt(config(tmp_path, existing))
        assert [path.name for path in run.path.parent.iterdir()] == ["test"]
    open_run_folder(config(tmp_path, existing)).close()


def test_of_two_that_begin_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have found no folder."""
    monkeypatch.setattr("dapo_megatron.obs.run_folder.check_run_folder", lambda config: None)
    with closing(open_run_folder(config(tmp_path, "resume"))):
        with pytest.raises(ConfigError, match="in use by process"):
            open_run_folder(config(tmp_path, "resume"))
        with pytest.raises(ConfigError, match="File exists"):
            open_run_folder(config(tmp_path, "refuse"))


def test_a_failure_lets_the_folder_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("dapo_megatron.obs.run_folder.versions", fail)
        with pytest.raises(ConfigError, match="No space left"):
            open_run_folder(config(tmp_path))
    open_run_folder(config(tmp_path, "resume")).close()


def test_a_name_that_is_not_there_yet(tmp_path: Path) -> None:
    with closing(FolderLock(tmp_path)):
        (tmp_path / LOCK).write_text("")
        with pytest.raises(ConfigError, match="in use by another run;"):
            check_free(tmp_path)


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    number = errno.ENOLCK
    with closing(open_run_folder(config(tmp_path))) as run:
        assert run.notes == ["this file system has no locks: see that no two runs use this folder"]
    number = errno.EIO
    with pytest.raises(ConfigError, match=r"cannot use the folder .*: Input/output error"):
        check_run_folder(config(tmp_path, "resume"))
