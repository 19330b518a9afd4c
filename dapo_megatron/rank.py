"""The process of one rank: reads the configuration, trains, and ends once, saying why.

A rank that fails says the reason first, tells the others, closes what it has opened within a limit, and then ends the
process without a farewell to any process group: NCCL's would wait for ranks that wait elsewhere.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn

import psutil

from dapo_megatron import config_file
from dapo_megatron.actor import topology
from dapo_megatron.actor.topology import Topology
from dapo_megatron.config import Config
from dapo_megatron.data.tokenizer import decoder
from dapo_megatron.errors import DapoError, EngineError
from dapo_megatron.heartbeat import SETTLE_SECONDS, Failure, Peers, join
from dapo_megatron.launch import CLOSE_SECONDS, check_launch, parent_command, saving_is_cut_short
from dapo_megatron.obs.observer import NullObserver, Observer, RunObserver
from dapo_megatron.obs.run_folder import nothing_to_do
from dapo_megatron.obs.terminal import printable
from dapo_megatron.preflight import Checked, preflight, preflight_node
from dapo_megatron.processes import end_with_parent, leave, outlive_output
from dapo_megatron.rollout.node import NodeEngines, introduce
from dapo_megatron.rollout.nodes import Nodes
from dapo_megatron.signals import Insistence, heeded, listen
from dapo_megatron.stop import REQUEUE, Stop, StopRequested
from dapo_megatron.train import train
from dapo_megatron.weights.group import let_us_end_transmissions

log = logging.getLogger(__name__)

_UNWIND_SECONDS = 5.0
"""For the main thread to hear that the run ends. In a collective it hears nothing."""
_HEARD_SECONDS = SETTLE_SECONDS + 0.5
"""For the heartbeat to say that another rank is gone, where torchrun, which sees that first, has sent a signal."""
_SAME_SECONDS = 1.0
"""Within which the same signal is the same request."""
_INTERRUPTED = 128 + signal.SIGINT
_LEADER_PATIENCE = timedelta(minutes=2)
"""By how much longer the leader waits in a collective. It has to be there when the others give up, to say why: NCCL's
watchdog ends a process about a minute after the limit, with words of its own; ranks come to a collective one by one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run under torchrun. Returns 0, or ends the process: with 2 for input that cannot work, 1 for a failure."""
    outlive_output()
    path, *overrides = sys.argv[1:] if argv is None else argv
    return _Rank().run(Path(path), overrides)


class _Rank:
    def __init__(self) -> None:
        self._rank = int(os.environ.get("RANK", "0"))
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._is_leader = self._rank == 0
        self._local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", self._world_size))
        self._speaks = self._rank == max(1, self._rank - self._local_rank)
        """Whether this rank says for its machine that the leader is lost: the first there that is not the leader."""
        self._peers = Peers()
        self._obs: RunObserver | None = None
        self._opened = ExitStack()
        self._heard: Failure | None = None
        """Why this rank is to end, where the heartbeat or a signal has said so before it failed itself."""
        self._hearing = threading.Event()
        self._quiet_seconds = 0.0
        self._saying, self._said = threading.Lock(), threading.Event()
        self._stop = Stop()
        self._insistence = Insistence(_SAME_SECONDS)
        self._parent = os.getppid()
        self._trains = False
        """Whether there may be something to save."""
        self._done = False
        self._save_seconds = _UNWIND_SECONDS
        self._limit = threading.Timer(0, self._saved_nothing)
        self._signalled = threading.Event()

    def run(self, path: Path, overrides: Sequence[str]) -> int:
        listen(heeded(), self._asked if self._is_leader else self._pass_on)
        if not self._is_leader:
            warnings.simplefilter("ignore")  # the leader's go to its log, and say the same
        end_with_parent()
        try:
            with self._stop.interruptible():  # there is nothing to save yet
                config, topo, obs, checked = self._begin(path, overrides)
            self._train(config, topo, obs, checked)
            self._close()
        except BaseException as error:
            self._end(error)
        return 0

    def _begin(self, path: Path, overrides: Sequence[str]) -> tuple[Config, Topology, Observer, Checked | None]:
        """Find the other ranks, check everything, and make the process groups."""
        config = config_file.load(path, overrides)
        check_launch(os.environ, config.run)
        launch = config.launch
        self._quiet_seconds = launch.lost_seconds / 2
        topology.prepare()  # before anybody counts the seconds that this rank is silent
        store = topology.rendezvous(timedelta(seconds=launch.join_seconds))
        peers = join(
            store,
            self._rank,
            self._world_size,
            self._heard_of if self._is_leader else self._follow,
            self._asked_elsewhere,
            address=None if topology.on_one_machine() else os.environ.get("MASTER_ADDR"),
            lost_seconds=launch.lost_seconds,
            join_seconds=launch.join_seconds,
            port=launch.heartbeat_port,
        )
        self._peers = self._opened.enter_context(closing(peers))
        obs: Observer = NullObserver()
        checked = None
        if self._is_leader:
            if over := nothing_to_do(config):
                self._print("\n".join(f"dapo-megatron: {line}" for line in over))
                sys.exit(0)
            nodes = (
                Nodes(peers, config, self._world_size, launch.join_seconds) if config.engine.on_other_nodes else None
            )
            checked = preflight(config, self._world_size, self._local_ranks, nodes)
            obs = self._obs = self._opened.enter_context(closing(RunObserver(config, decoder(checked.tokenizer))))
            for line in checked.plan:
                obs.message(line)
            cut_short = saving_is_cut_short(os.environ, parent_command(), config.checkpoint.signal_seconds)
            for warning in (*checked.warnings, *([cut_short] if cut_short else [])):
                obs.message(f"warning: {warning}")
        elif config.engine.on_other_nodes:
            self._offer_engines(config, peers)
        peers.after_leader("checks")
        limit = timedelta(seconds=launch.collective_seconds) + (_LEADER_PATIENCE if self._is_leader else timedelta())
        if config.weights.transport == "nccl":
            let_us_end_transmissions(os.environ)
        return config, topology.initialize(config.parallel, timeout=limit, store=store), obs, checked

    def _offer_engines(self, config: Config, peers: Peers) -> None:
        """On another rank: let the leader start engines on this machine, if this is the first rank here."""
        introduce(peers, self._local_rank)
        if self._local_rank == 0:
            check = partial(preflight_node, ranks=self._local_ranks)
            master = os.environ["MASTER_ADDR"]
            engines = NodeEngines(config, peers, check, master=master, ranks=self._local_ranks)
            self._opened.enter_context(closing(engines))

    def _train(self, config: Config, topo: Topology, obs: Observer, checked: Checked | None) -> None:
        self._save_seconds = config.checkpoint.signal_seconds
        if self._is_leader and config.run.max_hours is not None:
            self._stop_after(config.run.max_hours)
        self._trains = True
        train(config, topo, self._peers, obs, checked, self._opened, self._stop)
        if self._stop.saved:
            raise StopRequested(self._stop.exit_code)
        self._peers.after_leader("end")
        self._done = True  # whatever was asked meanwhile
        self._limit.cancel()
        topology.shutdown()

    def _close(self) -> None:
        """After all steps: an engine that does not end does not undo them."""
        try:
            self._opened.close()
        except EngineError as error:
            self._print(f"dapo-megatron: warning: {error}")

    def _stop_after(self, hours: float) -> None:
        """Stop in time to have saved and closed when this process is so old."""
        age = time.time() - psutil.Process().create_time()
        left = hours * 3600 - age - self._save_seconds - CLOSE_SECONDS
        timer = threading.Timer(max(0.0, left), self._ask, [f"stopped before run.max_hours({hours:g}) is over"])
        timer.daemon = True
        timer.start()

    def _end(self, error: BaseException) -> NoReturn:
        """Say why this rank ends, close everything and leave."""
        self._stop.settle()
        for number in heeded():  # nothing replaces the reason
            signal.signal(number, signal.SIG_IGN)
        self._limit.cancel()
        failure = self._cause(error)
        _leave_within(CLOSE_SECONDS, failure.exit_code)
        self._say(failure)
        try:
            self._opened.close()
        except Exception:
            log.exception("closing after a failure")
        leave(failure.exit_code)

    def _cause(self, error: BaseException) -> Failure:
        match error:
            case StopRequested():
                return self._stopped()
            case SystemExit() if self._heard:
                return self._heard
            case SystemExit(code=int(code)):  # the leader knows why
                return Failure("", code)
            case EngineError() if failure := self._hear_more():
                return failure  # the rank that the engine has gone with
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

    def _stopped(self) -> Failure:
        """What a run that was asked to stop ends with."""
        stop = self._stop
        if not stop.saved and (failure := self._hear_more()):
            return failure
        if self._trains:
            return Failure(stop.words, stop.exit_code)
        # At the start torchrun may have sent SIGTERM because another rank failed, which has said why.
        silent = self._world_size > 1 and stop.exit_code != _INTERRUPTED
        return Failure("" if silent else f"{stop.reason}", stop.exit_code)

    def _hear_more(self) -> Failure | None:
        """What the heartbeat has to say about why this rank is to end, which takes it a moment."""
        if self._world_size > 1:
            self._hearing.wait(_HEARD_SECONDS)
        return self._heard

    def _say(self, failure: Failure) -> None:
        """Say why the run ends and tell the other ranks, once. What is printed from then on goes to the log.

        For torchrun's caller, who does not get the exit code, a file says that the run is to be started again.
        """
        with self._saying:
            if self._said.is_set():
                return
            if self._is_leader and failure.reason:
                self._print(f"dapo-megatron: {failure.reason}{self._peers.whereabouts() if failure.late else ''}")
            told = self._peers.tell(failure)
            if not self._is_leader and not told and failure.reason:
                self._print(f"dapo-megatron: rank {self._rank}: {failure.reason}")
            self._said.set()
            if self._obs and failure.exit_code == REQUEUE:
                try:
                    self._obs.ask_again()
                except OSError:
                    log.exception("leaving word that the run is to be started again")

    def _print(self, text: str) -> None:
        if self._obs:
            self._obs.last_words(printable(text))
        else:
            with suppress(OSError):  # the others are to be told all the same
                print(printable(text), file=sys.stderr, flush=True)

    def _heard_of(self, failure: Failure) -> None:
        """On the leader, in a thread: end the run. Unwind the main thread, or do without it."""
        self._heard = self._heard or failure
        self._hearing.set()
        self._stop.unwind(failure.exit_code)
        if not self._said.wait(_UNWIND_SECONDS):
            _leave_within(_UNWIND_SECONDS, failure.exit_code)
            self._say(self._heard)
            leave(failure.exit_code)

    def _asked(self, number: signal.Signals) -> None:
        """On the leader, in a thread: a signal has come."""
        code = 128 + number
        if os.getppid() != self._parent:
            self._heard_of(Failure("", code))
        elif self._done:  # nothing is left but to close
            _leave_within(CLOSE_SECONDS, 0)
        elif self._insistence.insists(number):
            # It may be torchrun's, which clears away what another rank has left.
            if number != signal.SIGTERM or not self._hear_more():
                self._heard_of(Failure(f"{_because(number)} at once; {self._stop.last_checkpoint}", code))
        else:
            self._ask(_because(number), _code_of(number))

    def _asked_elsewhere(self, signal_name: str, rank_name: str) -> None:
        """On the leader, in a thread: a signal has come to another rank."""
        time.sleep(_SAME_SECONDS / 2)  # as a rule all ranks get it, and then none has to be named
        number = signal.Signals[signal_name]
        self._ask(f"{_because(number)} on {rank_name}", _code_of(number))

    def _ask(self, reason: str, exit_code: int = REQUEUE) -> None:
        """On the leader, in a thread: have the run save and end, within a limit."""
        if not self._stop.ask(reason, exit_code):
            return
        self._limit = threading.Timer(self._save_seconds, self._saved_nothing)
        self._limit.daemon = True
        self._limit.start()
        if self._trains:
            limit = f"within {self._save_seconds:g} s; Ctrl-C or SIGTERM ends the run at once"
            log.warning("%s: saving what is done and ending at the next safe point, %s", reason, limit)

    def _saved_nothing(self) -> None:
        """On the leader, in a thread: the time for saving is over."""
        stop = self._stop
        if stop.saved or self._done:
            return
        if stop.left:
            reason = f"{stop.reason}: saved after all steps; what is left is {stop.left}"
            self._heard_of(Failure(reason, stop.exit_code))
            return
        code = _INTERRUPTED if stop.exit_code == _INTERRUPTED else 128 + signal.SIGTERM
        limit = f"within checkpoint.signal_seconds({self._save_seconds:g})"
        reason = f"{stop.reason}: nothing was saved {limit}; {stop.last_checkpoint}" if self._trains else ""
        self._heard_of(Failure(reason, code, late=self._trains))

    def _pass_on(self, number: signal.Signals) -> None:
        """On another rank, in a thread: a signal has come. The leader decides, and this rank stays for the save."""
        self._signalled.set()
        if os.getppid() != self._parent:
            leave(128 + number)
        if self._done:  # nothing is left but to close
            _leave_within(CLOSE_SECONDS, 0)
            return
        if self._insistence.insists(number):
            time.sleep(2 * _HEARD_SECONDS)  # as a rule the leader has got it, too, and says so
            self._say(Failure(f"{_because(number)} at once", 128 + number))
            leave(128 + number)
        if not self._peers.pass_on(number.name):
            leave(_code_of(number))

    def _follow(self, failure: Failure) -> None:
        """On another rank, in a thread: the leader has ended, or is lost. There is nothing to close here."""
        if failure.reason and not self._speaks:
            # Not before the one that speaks, whose beats may be later: torchrun ends all when the first has gone.
            self._signalled.wait(self._quiet_seconds)
            leave(failure.exit_code)
        _leave_within(_UNWIND_SECONDS, failure.exit_code)
        if failure.reason:
            self._print(f"dapo-megatron: rank {self._rank}: {failure.reason}")
        leave(failure.exit_code)


def _leave_within(seconds: float, exit_code: int) -> None:
    """Leave after so long at the latest, whatever hangs meanwhile: a terminal that takes no more, a server."""
    deadline = threading.Timer(seconds, os._exit, [exit_code])
    deadline.daemon = True
    deadline.start()


def _because(number: signal.Signals) -> str:
    return "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"


def _code_of(number: signal.Signals) -> int:
    """The exit code of a run that has stopped for this signal."""
    return _INTERRUPTED if number == signal.SIGINT else REQUEUE
