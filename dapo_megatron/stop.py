"""Ends a run before its last step with everything saved: who asks for that, and when the main thread hears of it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REQUEUE = os.EX_TEMPFAIL
"""Exit code of a run that has stopped as it was asked to: started again, it goes on."""

_WAKE = signal.SIGURG
"""Reaches the main thread also where it waits in the kernel. Nobody else sends it, and without a handler it is
ignored."""


class StopRequested(SystemExit):
    """The run is to save and to end; what the leader was at can be thrown away. It is no error of the run.

    A SystemExit, because that leaves an event loop wherever it is raised, and nobody takes it for a failure.
    """


class Stop:
    """Whether the run is to stop. The leader decides, and tells the other ranks (`Peers.leader_says`).

    Made in the main thread, which alone enters `interruptible`.

    Attributes:
        reason: why the run is to stop, for people; None as long as it goes on.
        exit_code: what the run then ends with.
        saved: set by the training loop once all is on disk and the run may end: what was saved, for people.
        left: set by the training loop while all steps are saved and the run may end at any time: what is to be made
            again then, for people.
        last_checkpoint: kept by the training loop: from where a run that could not save goes on, for people.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.exit_code = REQUEUE
        self.saved: str | None = None
        self.left: str | None = None
        self.last_checkpoint = "there is no checkpoint"
        self._asking = threading.RLock()
        self._inside = 0
        self._raised = False
        self._unwinding: int | None = None
        signal.signal(_WAKE, self._woken)

    @property
    def words(self) -> str:
        """Why the run has stopped and what is left of it, for people."""
        return f"{self.reason}: {self.saved or f'nothing was saved; {self.last_checkpoint}'}"

    def ask(self, reason: str, exit_code: int = REQUEUE) -> bool:
        """Ask the run to stop, from any thread or signal handler. Returns whether nobody had asked before."""
        with self._asking:
            if self.reason is not None:
                return False
            self.exit_code, self.reason = exit_code, reason
        self._wake()
        return True

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Around what can be thrown away: a request to stop raises `StopRequested` in it at once.

        So does one that came before. An error that follows the request is taken for its consequence: whoever ends a
        job may end engines and graders with it.
        """
        self._inside += 1
        try:
            if self.reason is not None:
                self._raised = True
                raise StopRequested(self.exit_code)
            yield
        except Exception as error:
            if self.reason is None:
                raise
            raise StopRequested(self.exit_code) from error
        finally:
            self._inside -= 1

    @contextmanager
    def uninterruptible(self) -> Iterator[None]:
        """Within `interruptible`, around what other ranks take part in: a request that comes meanwhile is heard after.

        Raises:
            StopRequested: on leaving.
        """
        inside, self._inside = self._inside, 0
        try:
            yield
        finally:
            self._inside = inside
        if inside and self.reason is not None and not self._raised:
            self._raised = True
            raise StopRequested(self.exit_code)

    def unwind(self, exit_code: int) -> None:
        """Raise SystemExit in the main thread, wherever it is; called from other threads."""
        self._unwinding = exit_code
        self._wake()

    def settle(self) -> None:
        """From now on the main thread is not interrupted any more."""
        signal.signal(_WAKE, signal.SIG_IGN)

    def _wake(self) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)

    def _woken(self, number: int, frame: FrameType | None) -> None:
        if self._unwinding is not None:
            self.settle()
            sys.exit(self._unwinding)
        # Only once: the section is being left.
        if self._inside and self.reason is not None and not self._raised:
            self._raised = True
            raise StopRequested(self.exit_code)
