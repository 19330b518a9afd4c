"""An engine's processes: start them, wait until they answer, notice when they die, end them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol

from dapo_megatron.errors import EngineError
from dapo_megatron.rollout.token import TOKEN, make_token

LOG_LINES = 20
"""Lines of the log shown when an engine fails."""
_CLOSE_SECONDS = 10.0
_SERVER_ERRORS = 500
"""From this status on, a server may come to answer yet."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        """Wherever that is, it is not to see the token."""


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)
"""Engines are asked directly, whatever http_proxy says, and where they are said to be."""
POLL_SECONDS = 0.05
"""Between two questions whether a server answers."""


def answers(url: str) -> Callable[[], bool]:
    """A check that holds when `url` answers 200.

    Raises:
        EngineError: from the check, where something else than an engine answers.
    """

    def check() -> bool:
        try:
            with DIRECT.open(url, timeout=5) as response:
                return response.status == 200
        except urllib.error.HTTPError as error:
            if error.code < _SERVER_ERRORS:
                raise EngineError(f"{url}: HTTP {error.code}: something else than an engine answers there") from error
            return False
        except OSError:
            return False
        except HTTPException as error:
            raise EngineError(f"{url}: what answers there is no HTTP ({error!r}), so no engine") from error

    return check


class Server(Protocol):
    """What there is to know of an engine's processes for those who ask it."""

    @property
    def name(self) -> str:
        """Used in messages, for example "engine 0"."""
        ...

    @property
    def token(self) -> str:
        """What every request shows."""
        ...

    @property
    def run(self) -> str:
        """Who asks (`lease.RUN`), of the runs that may; empty where there is one only."""
        ...

    @property
    def version(self) -> int:
        """The weights that the engine has when it first answers: 0, those of model.path, or `UNKNOWN`."""
        ...

    @property
    def alive(self) -> bool: ...

    def ready(self, timeout_seconds: float) -> bool:
        """Return whether the server answers.

        Raises:
            EngineError: where it has not within the time-out, or never will.
        """
        ...

    def describe(self) -> str:
        """What can be said of it where something has failed."""
        ...

    def close(self) -> None:
        """End what was started for this run. Safe to call twice."""
        ...


UNKNOWN = -1
"""Version of weights of which nobody here knows what they are."""


class ServerElsewhere:
    """A `Server` that somebody else starts and ends.

    Args:
        name: used in messages, for example "engine 0".
        url: where it answers.
        token: that of its processes.
        ready: holds once it answers.
        run: who asks.
    """

    version = UNKNOWN
    alive = True

    def __init__(self, name: str, url: str, token: str, ready: Callable[[], bool], run: str = "") -> None:
        self.name, self.token, self.run = f"{name} ({url})", token, run
        self._ready = ready
        self._since = time.monotonic()

    def ready(self, timeout_seconds: float) -> bool:
        if self._ready():
            return True
        if time.monotonic() - self._since > timeout_seconds:
            raise EngineError(
                f"{self.name} did not answer within {timeout_seconds:g} s (engine.startup_seconds); is it "
                f"started there, by `dapo-megatron engines`, and does a firewall let this machine through?"
            )
        return False

    def describe(self) -> str:
        return f"{self.name} was not started by this run: its log is on its own machine"

    def close(self) -> None: ...


class StartedServer:
    """A `Server` that is a command under the guard: it cannot outlive this process.

    Args:
        name: used in messages, for example "engine 0".
        command: what to run.
        env: its whole environment.
        log: file for its output, created anew.
        ready: holds once it answers.
        token: what the command is told as `TOKEN` and a `Client` shows; made where it is not given.

    Raises:
        EngineError: from `wait_ready` and `check`, with exit status and the end of the log.
    """

    version = 0
    run = ""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        ready: Callable[[], bool],
        token: str | None = None,
    ) -> None:
        self.name, self.log = name, log
        self.token = token or make_token()
        self._ready = ready
        self._started = time.monotonic()
        self._closed = False
        guard = [sys.executable, "-m", "dapo_megatron.rollout.guard", "--", *command]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._guard = subprocess.Popen(
                guard,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**env, TOKEN: self.token},
                start_new_session=True,  # torchrun signals a rank's whole process group
            )

    @property
    def alive(self) -> bool:
        return self._guard.poll() is None

    def wait_ready(self, timeout_seconds: float) -> None:
        """Block until the server answers. The time-out counts from the start of the process."""
        while not self.ready(timeout_seconds):
            time.sleep(POLL_SECONDS)

    def ready(self, timeout_seconds: float) -> bool:
        """Return whether the server answers, which it has to do within the time-out from the start of the process."""
        if self._ready():
            # Something else may have taken the port and be the one that answers.
            self.check()
            return True
        self.check()
        if time.monotonic() - self._started > timeout_seconds:
            self.close()
            raise EngineError(
                f"{self.name} did not answer within {timeout_seconds:g} s (engine.startup_seconds); "
                f"it was ended\n{self._end_of_log()}"
            )
        return False

    def check(self) -> None:
        if not self.alive:
            raise EngineError(self.describe())

    def describe(self) -> str:
        """Whether the process has ended, and the end of its log."""
        status = self._guard.poll()
        state = "has not ended" if status is None else f"ended with exit status {_spell(status)}"
        return f"{self.name} {state}\n{self._end_of_log()}"

    def close(self) -> None:
        """End the process and all of its descendants. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        assert self._guard.stdin
        self._guard.send_signal(signal.SIGCONT)  # a guard that was stopped would sleep on
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.close()
        try:
            self._guard.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise EngineError(
                f"{self.name} did not end within {_CLOSE_SECONDS:g} s; end process {self._guard.pid} and its children"
            ) from error

    def _end_of_log(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        shown = "\n".join(f"  | {line}" for line in lines) or "  | (empty)"
        return f"the end of its log {self.log}:\n{shown}"


def _spell(status: int) -> str:
    return f"{status} (signal {status - 128})" if status > 128 else str(status)
