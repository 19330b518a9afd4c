"""Runs ranks as processes that are started once and used for one layout after the other."""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import socket
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import cache
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from typing import Any

from dapo_megatron.errors import DapoError
from dapo_megatron.processes import end_with_parent

GRACE = 3.0
"""Seconds that the other ranks have left after one failed, and before the end at which a rank says where it hangs."""

RUNS = 40
"""Calls after which processes are replaced: gloo keeps threads of every process group that was left, in the end
thousands."""


class RankError(DapoError, RuntimeError):
    """A rank failed, died or hung."""


class RankPool:
    """Ranks, each a pool of one process, for one that dies takes its pool along; they start when first needed."""

    def __init__(self) -> None:
        self._ranks: list[ProcessPoolExecutor] = []
        self._runs = 0

    def run(self, ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float) -> list[Any]:
        """Call `function(*arguments)` on `ranks` processes under torchrun's environment; return what it gave, by rank.

        Args:
            function: one of a module's top level, so that another process can import it. It joins the process group.
            timeout: seconds. Shortly before they are over, every rank prints where it is.

        Raises:
            RankError: with the traceback of the rank that failed first, the last line of the others', and the ranks
                that did not end. New processes are started for the next call.
        """
        with socket.create_server(("127.0.0.1", 0)) as probe:
            world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        world |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        # Pickled here, for the executor's own pickling leaves tensors in this process for the other one to fetch.
        work = pickle.dumps((function, arguments))
        if self._runs == RUNS:
            self.close()
        self._runs += 1
        try:
            while len(self._ranks) < ranks:
                self._ranks.append(ProcessPoolExecutor(1, _context(), _start))
            futures = [
                executor.submit(_call, {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, timeout, work)
                for rank, executor in enumerate(self._ranks[:ranks])
            ]
            return _collect(futures, timeout)
        except BaseException as error:
            # The other ranks wait for a collective that does not come.
            self.close()
            if isinstance(error, BrokenProcessPool):
                raise RankError("a rank died while it had nothing to do") from error
            raise

    def close(self) -> None:
        """End all processes. Safe to call twice."""
        for executor in self._ranks:
            for process in list((executor._processes or {}).values()):  # no public way to end them before Python 3.14
                process.kill()
            executor.shutdown(cancel_futures=True)
        self._ranks, self._runs = [], 0


@cache
def _context() -> BaseContext:
    """Ranks are forked from a process that has imported what they need; CUDA does not survive that."""
    import torch

    if torch.cuda.is_available():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["dapo_megatron.check_reduction.forked"])
    return context


def _collect(futures: Sequence[Future[bytes]], timeout: float) -> list[Any]:
    """Wait for all ranks; after the first failure only a little longer, for the others may hang in a collective."""
    first: Future[bytes] | None = None
    with suppress(TimeoutError):
        first = next((future for future in as_completed(futures, timeout) if future.exception()), None)
    if first:
        wait(futures, GRACE)
    late = [rank for rank, future in enumerate(futures) if not future.done()]
    if not first and not late:
        return [pickle.loads(future.result()) for future in futures]  # from processes of ours
    failed = [(rank, future) for rank, future in enumerate(futures) if future.done() and future.exception()]
    problems = []
    # What came first is the cause. Others then lose their connection to it.
    for rank, future in sorted(failed, key=lambda pair: pair[1] is not first):
        error = future.exception()
        text = "it died" if isinstance(error, BrokenProcessPool) else str(error).rstrip()
        problems.append(f"rank {rank} failed: {text if future is first else text.splitlines()[-1]}")
    if late:
        problems.append(f"ranks {late} had not answered after {'the others failed' if first else f'{timeout:g} s'}")
    raise RankError("\n".join(problems))


def _start() -> None:
    """Prepare a new process, before it imports torch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    end_with_parent()
    warnings.simplefilter("ignore")
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TORCH_CPP_LOG_LEVEL="ERROR")
    import torch

    torch.set_num_threads(1)


def _call(environment: dict[str, str], timeout: float, work: bytes) -> bytes:
    """Run in the process of a rank. What is raised there is told in words: not every exception can be pickled."""
    os.environ.update(environment)
    faulthandler.dump_traceback_later(max(timeout - GRACE, 1), file=2)
    try:
        function, arguments = pickle.loads(work)  # from our parent
        return pickle.dumps(function(*arguments))
    except BaseException:
        raise RankError(traceback.format_exc()) from None
    finally:
        faulthandler.cancel_dump_traceback_later()
        # A process group ends with the last that refers to it, and its threads wake up 100 times a second until then.
        gc.collect()
        gc.freeze()  # what is left came of imports: not to be looked through again
