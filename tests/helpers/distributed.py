"""Run a function on several ranks: real processes over gloo, a time limit, and errors one can read."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


def run_distributed(function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(*args)` in `ranks` new processes with torchrun's environment; what it returned, by rank.

    Args:
        function: of a module's top level, so that a new process can import it. It joins the process group itself.
        timeout: seconds for all of it. When it is over, every rank prints where it hangs and is killed.

    Raises:
        AssertionError: with the traceback of every rank that failed, or the ranks that did not end in time.
    """
    context = multiprocessing.get_context("spawn")
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
    environment["LOCAL_WORLD_SIZE"] = str(ranks)
    pipes: list[Connection] = []
    processes = []
    for rank in range(ranks):
        ours, theirs = context.Pipe(duplex=False)
        pipes.append(ours)
        target_args = (theirs, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, timeout, function, args)
        processes.append(context.Process(target=_run_rank, args=target_args, daemon=True))
    try:
        with _Environment({"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}):
            for process in processes:
                process.start()
        return _collect(pipes, processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], processes: list[Any], deadline: float) -> list[Any]:
    """Wait for all ranks; after the first failure only a little longer, for the others then hang in a collective."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        seconds = deadline - time.monotonic()
        ready = wait([*waiting, *(processes[rank].sentinel for rank in waiting.values())], max(seconds, 0))
        if not ready:
            break
        for pipe, rank in list(waiting.items()):
            if pipe.poll():
                failed, value = pickle.loads(pipe.recv_bytes())
                (failures if failed else results)[rank] = value
                del waiting[pipe]
            elif not processes[rank].is_alive():
                failures[rank] = f"died with exit code {processes[rank].exitcode}"
                del waiting[pipe]
        if failures:
            deadline = min(deadline, time.monotonic() + 3)
    if failures or waiting:
        parts = [f"rank {rank} failed:\n{text}" for rank, text in sorted(failures.items())]
        if waiting:
            parts.append(f"ranks {sorted(waiting.values())} had not ended")
        raise AssertionError("\n".join(parts))
    return [results[rank] for rank in range(len(pipes))]


def _run_rank(
    pipe: Connection, environment: dict[str, str], timeout: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    faulthandler.dump_traceback_later(max(timeout - 2, 1), file=2)
    warnings.simplefilter("ignore")
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    try:
        # Not pipe.send, which hands tensors over as open files that end with this process.
        answer = pickle.dumps((False, function(*args)))
    except BaseException:
        # Whatever it is, the parent should show it rather than a dead process.
        answer = pickle.dumps((True, traceback.format_exc()))
    pipe.send_bytes(answer)
    pipe.close()
    # Not through the interpreter's end: a failed rank would wait there for the others' collectives.
    sys.stdout.flush()
    os._exit(0)


class _Environment:
    """Variables that new processes inherit, set for a while."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._variables = variables

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self._variables}
        os.environ.update(self._variables)

    def __exit__(self, *error: object) -> None:
        for name, value in self._before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
