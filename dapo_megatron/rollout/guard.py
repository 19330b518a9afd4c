"""Runs a command and ends its whole process tree when the process that holds our standard input is gone.

    python -m dapo_megatron.rollout.guard -- COMMAND...

The trainer keeps the other end of the pipe. However it ends, SIGKILL included, the kernel closes the pipe, and no
engine outlives it: not its workers, and not what those left behind when they died. The command has a folder of its own
for temporary files, such as the sockets at which its processes meet, and that goes with it.

What the command prints becomes our standard output. Where that is a file on a full disk, it is lost: engines end where
they cannot print.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType

import psutil

from dapo_megatron.processes import adopt_orphans, end_with_parent

GRACE_SECONDS = 3.0
"""Between SIGTERM and SIGKILL."""
_PRINT_SECONDS = 1.0
"""For the last words of the command, when all of its processes have ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the command's exit status, 128 + signal where a signal ended it."""
    command = list(sys.argv[1:] if argv is None else argv)
    if command[:1] == ["--"]:
        command = command[1:]
    if not command:
        print("usage: python -m dapo_megatron.rollout.guard -- COMMAND...", file=sys.stderr)
        return 2

    parent = os.getppid()
    # Orphaned grandchildren become our children instead of init's, so that they can be found.
    adopt_orphans()
    stop = threading.Event()

    def on_terminate(signum: int, frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, on_terminate)
    # A terminal sends Ctrl-C to all of its foreground processes; the trainer decides what it means for engines.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Its name is short: those of sockets in it may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="dapo-", ignore_cleanup_errors=True) as own:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment(own, os.environ),
                start_new_session=True,
                preexec_fn=_before_exec,
            )
        except OSError as error:
            print(f"guard: cannot start {command[0]}: {error.strerror}", file=sys.stderr)
            return 127

        assert child.stdout
        printing = threading.Thread(target=_print, args=(child.stdout.fileno(),), daemon=True)
        printing.start()
        threading.Thread(target=_wait_for_end_of_input, args=(stop,), daemon=True).start()
        # A process that the trainer forked may hold the pipe open after its death: look at the parent as well.
        while child.poll() is None and os.getppid() == parent and not stop.wait(0.05):
            pass
        end_descendants(0.0 if child.poll() is not None else GRACE_SECONDS)
        status = child.wait()
        printing.join(_PRINT_SECONDS)
    return status if status >= 0 else 128 - status


def environment(own: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """What the command is told: that temporary files go to its `own` folder, and kernels that torch compiles do not."""
    kernels = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"  # beside torch's own place for them
    # Behind the others: processes that give themselves a name find its place by the first variable, as long as it is
    # where they got it, and vLLM sets this one anew.
    return {**inherited, "TORCHINDUCTOR_CACHE_DIR": inherited.get("TORCHINDUCTOR_CACHE_DIR", kernels), "TMPDIR": own}


def end_descendants(grace_seconds: float) -> None:
    """SIGTERM, a grace period, then SIGKILL until no descendant of this process is left."""
    for process in _descendants():
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while _descendants() and time.monotonic() < deadline:
        time.sleep(0.02)
    while left := _descendants():
        for process in left:
            _signal(process, signal.SIGKILL)
        time.sleep(0.02)


def _descendants() -> list[psutil.Process]:
    """Living descendants. The dead stay zombies until this process ends, which is soon."""
    living = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _before_exec() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Should someone kill the guard, the engine still hears of it.
    end_with_parent()


def _print(output: int) -> None:
    while words := os.read(output, 65_536):
        with contextlib.suppress(OSError):
            os.write(1, words)


def _wait_for_end_of_input(stop: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    stop.set()


if __name__ == "__main__":
    sys.exit(main())
