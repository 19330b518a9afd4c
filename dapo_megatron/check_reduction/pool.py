"""Processes that are ranks: started once, used for one layout after the other."""

from __future__ import annotations

import contextlib
import faulthandler
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

GRACE = 3.0
"""Seconds: what the other ranks have left after one failed, and how long before the end a rank says where it hangs."""


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

    def run(self, ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float) -> list[Any]:
        """Call `function(*arguments)` on `ranks` processes under torchrun's environment; what it gave, by rank.

        Args:
            function: of a module's top level, so that another process can import it. It joins the process group itself.
            timeout: seconds. Shortly before they are over, every rank prints where it is.

        Raises:
            RankError: with the traceback of the rank that failed first, the last line of the others', and the ranks
                that did not end. New processes are started for the next call.
        """
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
        environment["LOCAL_WORLD_SIZE"] = str(ranks)
        try:
            self._start()
            pipes = [pipe for _, pipe in self._ranks[:ranks]]
            for rank, pipe in enumerate(pipes):
                own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                with contextlib.suppress(OSError):  # a dead rank, which is found where its answer is missing
                    # Not pipe.send, which leaves tensors in this process for the other one to fetch.
                    pipe.send_bytes(pickle.dumps((own, timeout, function, arguments)))
            return _collect(pipes, timeout)
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


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    """Wait for all ranks; after the first failure only a little longer, for the others then hang in a collective."""
    deadline = time.monotonic() + timeout
    answers: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                failed, answer = pickle.loads(pipe.recv_bytes())  # from a process of ours
            except (EOFError, OSError):
                failed, answer = True, "it died"
            (failures if failed else answers)[rank] = answer
        if failures:
            deadline = min(deadline, time.monotonic() + GRACE)
    if failures or waiting:
        # What came first is the cause. Others then lose their connection to it.
        texts = [text if index == 0 else text.rstrip().splitlines()[-1] for index, text in enumerate(failures.values())]
        problems = [f"rank {rank} failed: {text}" for rank, text in zip(failures, texts, strict=True)]
        if waiting:
            limit = "the others failed" if failures else f"{timeout:g} s"
            problems.append(f"ranks {sorted(waiting.values())} had not answered after {limit}")
        raise RankError("\n".join(problems))
    return [answers[rank] for rank in range(len(pipes))]


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
            environment, timeout, function, arguments = pickle.loads(pipe.recv_bytes())  # from our parent
            os.environ.update(environment)
            faulthandler.dump_traceback_later(max(timeout - GRACE, 1), file=2)
            try:
                answer = pickle.dumps((False, function(*arguments)))
            except BaseException:  # whatever it is, the parent should show it
                answer = pickle.dumps((True, traceback.format_exc()))
            faulthandler.cancel_dump_traceback_later()
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
