"""The guard, with stand-ins for an engine: a shell, a process that ignores SIGTERM, an orphaned grandchild."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dapo_megatron.rollout.guard import environment

GUARD = [sys.executable, "-m", "dapo_megatron.rollout.guard", "--"]

# Writes the pids of itself, of a child that ignores SIGTERM, and of a grandchild that outlived its parent in a session
# of its own.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pids = [os.getpid()]
read, write = os.pipe()
child = os.fork()
if child == 0:
    time.sleep(100)
middle = os.fork()
if middle == 0:
    os.setsid()
    orphan = os.fork()
    if orphan == 0:
        time.sleep(100)
    os.write(write, str(orphan).encode())
    os._exit(0)
os.waitpid(middle, 0)
orphan = int(os.read(read, 20))
with open(sys.argv[1] + ".new", "w") as file:
    print(os.getpid(), child, orphan, file=file)
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(100)
"""


@pytest.fixture
def pid_file(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "pids"
    yield file
    for pid in map(int, file.read_text().split()):
        if psutil.pid_exists(pid):
            psutil.Process(pid).kill()


def wait_for_pids(file: Path) -> list[int]:
    deadline = time.monotonic() + 10
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return [int(pid) for pid in file.read_text().split()]


def all_gone(pids: list[int], seconds: float) -> bool:
    def lives(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + seconds
    while any(map(lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(lives, pids))


def start(pid_file: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    guard = subprocess.Popen([*GUARD, sys.executable, "-c", STUBBORN, str(pid_file)], stdin=subprocess.PIPE)
    return guard, wait_for_pids(pid_file)


def test_the_tree_ends_with_the_pipe(pid_file: Path) -> None:
    guard, pids = start(pid_file)
    assert guard.stdin
    guard.stdin.close()
    assert all_gone(pids, 6)
    assert guard.wait(2) == 128 + signal.SIGKILL


def test_the_tree_ends_on_sigterm(pid_file: Path) -> None:
    guard, pids = start(pid_file)
    guard.terminate()
    assert all_gone(pids, 6)
    guard.wait(2)


def test_ctrl_c_is_left_to_the_trainer(pid_file: Path) -> None:
    guard, pids = start(pid_file)
    guard.send_signal(signal.SIGINT)
    assert not all_gone(pids, 0.3)
    guard.terminate()
    guard.wait(6)


@pytest.mark.parametrize("forks", [False, True], ids=["alone", "with a fork that holds the pipe"])
def test_the_tree_ends_when_the_trainer_is_killed(pid_file: Path, forks: bool) -> None:
    trainer = f"""
import os, subprocess, sys, time
guard = subprocess.Popen({[*GUARD, sys.executable, "-c", STUBBORN, str(pid_file)]!r}, stdin=subprocess.PIPE)
if {forks} and os.fork() == 0:
    time.sleep(15)
    os._exit(0)
guard.wait()
"""
    process = subprocess.Popen([sys.executable, "-c", trainer])
    pids = wait_for_pids(pid_file)
    process.kill()
    process.wait()
    assert all_gone(pids, 6)


def test_what_a_finished_command_left_behind_ends_too(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with subprocess.Popen(
        [*GUARD, "sh", "-c", f"sleep 100 & echo $! > {file}; exit 7"], stdin=subprocess.PIPE
    ) as guard:
        assert guard.wait(10) == 7
    assert all_gone([int(file.read_text())], 1)


def test_temporary_files_of_a_command_go_with_it(tmp_path: Path) -> None:
    """However it ends; and no two have the same folder."""
    code = (
        "import os, pathlib, socket, sys, tempfile, time; own = pathlib.Path(tempfile.gettempdir())\n"
        "(own / 'file').touch(); socket.socket(socket.AF_UNIX).bind(f'{own}/SOCKET')\n"
        "(new := pathlib.Path(sys.argv[1] + '.new')).write_text(str(own)); new.rename(sys.argv[1]); time.sleep(100)"
    ).replace("SOCKET", 36 * "x")
    files = [tmp_path / "first", tmp_path / "second"]
    guards = [subprocess.Popen([*GUARD, sys.executable, "-c", code, file], stdin=subprocess.PIPE) for file in files]
    deadline = time.monotonic() + 20
    while not all(file.exists() for file in files) and time.monotonic() < deadline:
        time.sleep(0.02)
    own = [Path(file.read_text()) for file in files]
    assert own[0] != own[1] and all((folder / "file").exists() for folder in own)
    guards[0].communicate()  # closes the pipe
    guards[1].terminate()
    guards[1].communicate()
    assert not any(folder.exists() for folder in own)


def test_compiled_kernels_are_kept() -> None:
    told = [environment(f"/tmp/{name}", {}) for name in "ab"]
    assert told[0]["TMPDIR"] == "/tmp/a" and told[0]["TORCHINDUCTOR_CACHE_DIR"] == told[1]["TORCHINDUCTOR_CACHE_DIR"]
    assert environment("/tmp/a", {"TORCHINDUCTOR_CACHE_DIR": "/x"})["TORCHINDUCTOR_CACHE_DIR"] == "/x"
    first = next(iter(environment("/tmp/a", {"PATH": "/bin"})))
    assert first == "PATH", "where a process finds the place of its name"


@pytest.mark.parametrize(("command", "status"), [("exit 3", 3), ("kill -9 $$", 128 + 9)])
def test_the_status_is_the_commands(command: str, status: int) -> None:
    with subprocess.Popen([*GUARD, "sh", "-c", command], stdin=subprocess.PIPE) as guard:
        assert guard.wait(10) == status


def test_a_command_that_is_not_there_is_named() -> None:
    guard = subprocess.run(
        [*GUARD, "/no/such/engine"], stdin=subprocess.PIPE, capture_output=True, text=True, timeout=10
    )
    assert guard.returncode == 127
    assert "cannot start /no/such/engine" in guard.stderr


def test_the_guard_starts_without_heavy_imports() -> None:
    listing = "import sys; import dapo_megatron.rollout.guard; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert found.stdout.split() == ["False", "False"]


def guarded(command: list[str], output: Any) -> subprocess.Popen[bytes]:
    """What `command` comes to under the guard, whose input stays open."""
    process = subprocess.Popen([*GUARD, *command], stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT)
    process.wait(timeout=20)
    return process


def test_what_a_command_prints_is_the_guards_output() -> None:
    done = guarded(["sh", "-c", "echo out; echo err >&2; printf 'last words'; kill -9 $$"], subprocess.PIPE)
    assert done.stdout
    assert (done.returncode, done.stdout.read()) == (137, b"out\nerr\nlast words")


def test_a_command_goes_on_where_the_disk_takes_nothing_more() -> None:
    command = [sys.executable, "-c", "print('words', flush=True); raise SystemExit(3)"]
    with Path("/dev/full").open("wb") as full:
        assert subprocess.run(command, stdout=full, stderr=full, timeout=20, check=False).returncode == 1
        assert guarded(command, full).returncode == 3
