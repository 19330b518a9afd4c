"""The process of one rank: reads the configuration, trains, and ends once, saying why.

A rank that fails says the reason first, tells the others, closes what it has opened within a limit, and then ends the
process without a farewell to any process group: NCCL's would wait for ranks that wait elsewhere.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NoReturn

from dapo_megatron import config_file
from dapo_megatron.actor import topology
from dapo_megatron.data.tokenizer import decoder
from dapo_megatron.errors import ConfigError, DapoError
from dapo_megatron.heartbeat import Failure, Peers, join
from dapo_megatron.obs.observer import NullObserver, RunObserver
from dapo_megatron.obs.terminal import printable
from dapo_megatron.preflight import preflight
from dapo_megatron.processes import end_with_parent, leave
from dapo_megatron.train import train

log = logging.getLogger(__name__)

_CLOSE_SECONDS = 10.0
"""For closing everything after a failure. torchrun kills what is left of a run 30 seconds after its first rank ended,
12 where `dapo-megatron train` has started it."""
_UNWIND_SECONDS = 5.0
"""For the main thread to hear that another rank failed. In a collective it hears nothing."""
_LEADER_PATIENCE = timedelta(minutes=2)
"""By how much longer the leader waits in a collective. It has to be there when the others give up, to say why: NCCL's
watchdog ends a process about a minute after the limit, with words of its own; ranks come to a collective one by one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run under torchrun. Returns 0, or ends the process: with 2 for input that cannot work, 1 for a failure."""
    path, *overrides = sys.argv[1:] if argv is None else argv
    return _Rank().run(Path(path), overrides)


class _Rank:
    def __init__(self) -> None:
        self._rank = int(os.environ.get("RANK", "0"))
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._is_leader = self._rank == 0
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._speaks = self._rank == max(1, self._rank - local_rank)
        """Whether this rank says for its machine that the leader is lost: the first there that is not the leader."""
        self._peers = Peers()
        self._obs: RunObserver | None = None
        self._opened = ExitStack()
        self._heard: Failure | None = None
        """What the heartbeat has said before this rank failed itself."""
        self._quiet_seconds = 0.0
        self._signals, self._woken = socket.socketpair()
        self._saying, self._said = threading.Lock(), threading.Event()

    def run(self, path: Path, overrides: Sequence[str]) -> int:
        # Only the leader has something to end. The others may be in a call that no Python handler interrupts.
        signal.signal(signal.SIGTERM, _terminate if self._is_leader else signal.SIG_DFL)
        if self._is_leader:
            for end in (self._signals, self._woken):
                end.setblocking(False)
            # Tells of signals also while the main thread is in a call that no Python handler interrupts.
            signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        else:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            warnings.simplefilter("ignore")  # the leader's go to its log, and say the same
        end_with_parent()
        try:
            self._train(path, overrides)
            self._opened.close()
        except BaseException as error:
            self._end(error)
        return 0

    def _train(self, path: Path, overrides: Sequence[str]) -> None:
        config = config_file.load(path, overrides)
        _check_launch(os.environ)
        launch = config.launch
        self._quiet_seconds = launch.lost_seconds / 2
        topology.prepare()  # before anybody counts the seconds that this rank is silent
        store = topology.rendezvous(timedelta(seconds=launch.join_seconds))
        peers = join(
            store,
            self._rank,
            self._world_size,
            self._heard_of if self._is_leader else self._follow,
            address=None if topology.on_one_machine() else os.environ.get("MASTER_ADDR"),
            lost_seconds=launch.lost_seconds,
            join_seconds=launch.join_seconds,
            port=launch.heartbeat_port,
        )
        self._peers = self._opened.enter_context(closing(peers))
        obs, checked = NullObserver(), None
        if self._is_leader:
            checked = preflight(config, self._world_size, int(os.environ.get("LOCAL_WORLD_SIZE", self._world_size)))
            obs = self._obs = self._opened.enter_context(closing(RunObserver(config, decoder(checked.tokenizer))))
            for warning in checked.warnings:
                obs.message(f"warning: {warning}")
        peers.after_leader("checks")
        limit = timedelta(seconds=launch.collective_seconds) + (_LEADER_PATIENCE if self._is_leader else timedelta())
        topo = topology.initialize(config.parallel, timeout=limit, store=store)
        train(config, topo, peers, obs, checked, self._opened)
        peers.after_leader("end")
        topology.shutdown()

    def _end(self, error: BaseException) -> NoReturn:
        """Say why this rank ends, close everything and leave."""
        for number in (signal.SIGTERM, signal.SIGINT):  # nothing replaces the reason
            signal.signal(number, signal.SIG_IGN)
        failure = self._cause(error)
        _leave_within(_CLOSE_SECONDS, failure.exit_code)
        self._say(failure)
        try:
            self._opened.close()
        except Exception:
            log.exception("closing after a failure")
        leave(failure.exit_code)

    def _cause(self, error: BaseException) -> Failure:
        match error:
            case SystemExit() if self._heard:
                return self._heard
            case SystemExit(code=int(code)):  # a signal, whose sender knows why
                return Failure("", code)
            case KeyboardInterrupt():
                return Failure("interrupted", 128 + signal.SIGINT)
            case DapoError():
                return Failure(f"error: {error}", error.exit_code)
        reason = "error: " + "".join(traceback.format_exception(error)).rstrip()
        if topology.is_lost_peer(error):
            # A consequence, as a rule: whoever failed is about to say why, or to be missed.
            if failure := self._peers.failure():
                return failure
            reason += "\n(every rank answers: the limit is launch.collective_seconds, or a connection broke)"
            return Failure(reason, 1, late=True)
        return Failure(reason, 1)

    def _say(self, failure: Failure) -> None:
        """Say why the run ends and tell the other ranks, once. What is printed from then on goes to the log."""
        with self._saying:
            if self._said.is_set():
                return
            if self._is_leader and failure.reason:
                self._print(f"dapo-megatron: {failure.reason}{self._peers.whereabouts() if failure.late else ''}")
            told = self._peers.tell(failure)
            if not self._is_leader and not told and failure.reason:
                self._print(f"dapo-megatron: rank {self._rank}: {failure.reason}")
            self._said.set()

    def _print(self, text: str) -> None:
        if self._obs:
            self._obs.last_words(printable(text))
        else:
            with suppress(OSError):  # the others are to be told all the same
                print(printable(text), file=sys.stderr, flush=True)

    def _heard_of(self, failure: Failure) -> None:
        """On the leader, in a thread: another rank failed. Unwind the main thread, or end without it."""
        if signal.SIGTERM in self._signalled():
            # Whoever ends a job ends all of its ranks, and this one is missed because it was quicker.
            reason = f"ended by SIGTERM; meanwhile: {failure.reason}"
            failure = replace(failure, reason=reason, exit_code=128 + signal.SIGTERM)
        self._heard = failure
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        if not self._said.wait(_UNWIND_SECONDS):
            _leave_within(_UNWIND_SECONDS, failure.exit_code)
            self._say(failure)
            leave(failure.exit_code)

    def _signalled(self) -> bytes:
        """Return the numbers of the signals that have come since this was asked last."""
        try:
            return self._signals.recv(4096)
        except BlockingIOError:
            return b""

    def _follow(self, failure: Failure) -> None:
        """On another rank, in a thread: the leader has ended, or is lost. There is nothing to close here."""
        if failure.reason and not self._speaks:
            # Not before the one that speaks, whose beats may be later: torchrun ends all when the first has gone.
            time.sleep(self._quiet_seconds)
            leave(failure.exit_code)
        _leave_within(_UNWIND_SECONDS, failure.exit_code)
        if failure.reason:
            self._print(f"dapo-megatron: rank {self._rank}: {failure.reason}")
        leave(failure.exit_code)


def _check_launch(environ: Mapping[str, str]) -> None:
    """
    Raises:
        ConfigError: where ranks were not started by torchrun, or it is to start them again.
    """
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    advice = "start one task per machine that runs torchrun, for example srun --ntasks-per-node=1 torchrun ..."
    if "RANK" not in environ and tasks > 1:
        raise ConfigError(f"srun started {tasks} tasks, each of them a run of its own: RANK is not set; {advice}")
    needed = ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    missing = [name for name in needed if name not in environ]
    if int(environ.get("WORLD_SIZE", "1")) > 1 and missing:
        raise ConfigError(f"WORLD_SIZE is {environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; {advice}")
    if (restarts := int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))) > 0:
        raise ConfigError(
            f"torchrun --max-restarts={restarts} would start the run again from its first step, in the same folder; "
            f"leave it at 0"
        )


def _leave_within(seconds: float, exit_code: int) -> None:
    """Leave after so long at the latest, whatever hangs meanwhile: a terminal that takes no more, a server."""
    deadline = threading.Timer(seconds, os._exit, [exit_code])
    deadline.daemon = True
    deadline.start()


def _terminate(signum: int, frame: FrameType | None) -> None:
    """Turn SIGTERM into an exception, so that engines are ended and files closed on the way out."""
    signal.signal(signum, signal.SIG_IGN)
    sys.exit(128 + signum)
