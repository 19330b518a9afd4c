from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from dapo_megatron.config import Config
from dapo_megatron.errors import ConfigError
from dapo_megatron.obs import lock
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
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(ConfigError, match="in use"):
            FolderLock(tmp_path)
        assert len(list(Path("/proc/self/fd").iterdir())) == before


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
    monkeypatch.setattr("dapo_megatron.obs.run_folder._check", lambda config, check_lock: None)
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


@contextmanager
def held_elsewhere(config: Config) -> Iterator[FolderLock]:
    """The folder of a run, whose lock a process of another machine holds."""
    open_run_folder(config).close()
    with closing(FolderLock(config.run.folder)) as held:
        (config.run.folder / LOCK).write_text(json.dumps({"host": "node7", "pid": 5, "since": "2026-01-31"}))
        yield held


def test_a_run_that_goes_on_waits_for_the_lock_of_a_machine_that_has_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            held.close()

    monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    with held_elsewhere(config(tmp_path)) as held:
        check_run_folder(config(tmp_path, "resume"))
        monkeypatch.setattr(held, "close", lambda: None)
    assert len(looks) == 3
    (told,) = caplog.messages
    assert re.search(r"runs/test is in use by process 5 on node7, since .*: waiting for up to 180 s$", told)
    open_run_folder(config(tmp_path, "resume")).close()


def test_who_waits_for_a_run_that_lives_is_refused_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=slept.append, monotonic=lambda: sum(slept)))
    with held_elsewhere(config(tmp_path)):
        with pytest.raises(ConfigError, match="in use by process 5 on node7, since"):
            check_run_folder(config(tmp_path, "resume"))
        assert 180 <= sum(slept) < 190 and len(caplog.messages) == 1
        with pytest.raises(ConfigError, match="in use by process 5 on node7, since"):
            open_run_folder(config(tmp_path, "resume"))  # whoever has it now is no machine that has died
        with pytest.raises(ConfigError, match="in use by process 5 on node7, since"):
            check_run_folder(config(tmp_path, "rename"))
        assert sum(slept) < 190 and len(caplog.messages) == 1


def test_nobody_waits_for_a_run_on_this_machine_or_of_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=pytest.fail, monotonic=time.monotonic))
    with held_elsewhere(config(tmp_path)):
        for owner in ("", json.dumps({"host": socket.gethostname(), "pid": 5, "since": "2026-01-31"})):
            (tmp_path / "runs/test" / LOCK).write_text(owner)
            with pytest.raises(ConfigError, match="in use by"):
                check_run_folder(config(tmp_path, "resume"))
