"""Processes that are ranks: started once, used for one layout after the other."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from dapo_megatron.errors import DapoError
from dapo_megatron.processes import end_with_parent


class RankError(DapoError, RuntimeError):
    """A rank failed, died or hung."""


class RankPool:
    """At most `size` ranks.

    Args:
        prepare: called once in every process, before anything else.
    """

    def __init__(self, size: int, prepare: Callable[[], None] | None = None) -> None:
        self._size, self._prepare = size, prepare
        self._ranks: list[tuple[BaseProcess, Connection]] = []

    def run(self, ranks: int, function: Callable[[Any], Any], argument: Any, *, timeout: float) -> Any:
        """`function(argument)` on `ranks` processes under torchrun's environment; what the first of them gave.

        Raises:
            RankError: with the traceback of the first rank that failed. New processes are started for the next call.
        """
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
        environment["LOCAL_WORLD_SIZE"] = str(ranks)
        try:
            self._start()
            pipes = [pipe for _, pipe in self._ranks[:ranks]]
            for rank, pipe in enumerate(pipes):
                with _death_is_an_error(rank):
                    pipe.send(({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, function, argument))
            return _collect(pipes, time.monotonic() + timeout, timeout)
        except BaseException:
            # The other ranks wait for a collective that does not come.
            self.close()
            raise

    def close(self) -> None:
        """End all processes. Safe to call twice."""
        for process, pipe in self._ranks:
            process.kill()
            process.join()
            pipe.close()
        self._ranks = []

    def _start(self) -> None:
        if self._ranks:
            return
        context = multiprocessing.get_context("spawn")
        with _variables({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TORCH_CPP_LOG_LEVEL": "ERROR"}):
            for _ in range(self._size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, self._prepare), daemon=True)
                process.start()
                theirs.close()
                self._ranks.append((process, ours))


def _collect(pipes: list[Connection], deadline: float, timeout: float) -> Any:
    answers: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} had not answered after {timeout:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            with _death_is_an_error(rank):
                failed, answer = pickle.loads(pipe.recv_bytes())  # from a process of ours
            if failed:
                raise RankError(f"rank {rank} failed:\n{answer}")
            answers[rank] = answer
    return answers[0]


@contextlib.contextmanager
def _death_is_an_error(rank: int) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        raise RankError(f"rank {rank} died") from None


def _serve(pipe: Connection, prepare: Callable[[], None] | None) -> None:
    """A process: one call after the other, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    end_with_parent()
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    if prepare:
        prepare()
    with contextlib.suppress(EOFError):
        while True:
            environment, function, argument = pipe.recv()
            os.environ.update(environment)
            try:
                answer = pickle.dumps((False, function(argument)))
            except Exception:  # whatever it is, the parent should show it
                answer = pickle.dumps((True, traceback.format_exc()))
            pipe.send_bytes(answer)


@contextlib.contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Set for the processes that are started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
