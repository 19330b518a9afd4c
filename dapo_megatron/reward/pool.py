"""Processes that can be killed do the grading. Model text is untrusted: it can make a grader hang or eat memory."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

import dapo_megatron
from dapo_megatron.errors import GradingError
from dapo_megatron.reward.math import WINDOW, Grade, Rule

CHUNK = 64
"""Items sent to a worker at a time, at the most."""

STARTUP_SECONDS = 120.0
"""A worker imports its rule before it is ready; sympy on a busy machine takes seconds."""

LOST = Grade(correct=False, extracted=None, timed_out=True)

Item = tuple[str, str]


class WorkerDiedError(Exception):
    """The process ended, or was killed, before it answered."""


class GradingPool:
    """A pool grades in `workers` processes, each item within `timeout_seconds` of wall-clock time.

    A worker that takes longer over one item is killed and replaced, as is one that dies; the item counts as wrong, with
    `timed_out` set, and no other item is affected. Workers start in the background and end with this process, however
    that ends. The pool belongs to no event loop and may be used from several.

    >>> with GradingPool("dapo", workers=2, timeout_seconds=5.0) as pool:
    ...     asyncio.run(pool.grade([("We add.\\nAnswer: 34", "34")]))
    [Grade(correct=True, extracted='34', timed_out=False)]
    """

    def __init__(self, rule: Rule, workers: int, timeout_seconds: float) -> None:
        self._closed = False
        self._workers = [_Worker(rule, timeout_seconds) for _ in range(workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        # A thread per worker waits for its answers, so that neither reading nor killing holds up the event loop.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="grading")

    async def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Grade (response, answer) pairs; the grades come in the same order.

        Raises:
            GradingError: where workers cannot be started, or the pool is closed.
        """
        if self._closed:
            raise GradingError("the grading pool is closed")
        size = min(CHUNK, max(1, len(items) // (4 * len(self._workers))))
        chunks = [items[start : start + size] for start in range(0, len(items), size)]
        loop = asyncio.get_running_loop()
        graded = await asyncio.gather(*(loop.run_in_executor(self._threads, self._grade_chunk, c) for c in chunks))
        return [grade for chunk in graded for grade in chunk]

    def close(self) -> None:
        """End the workers. Grading that is under way fails. Safe to call twice."""
        self._closed = True
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.reap()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _grade_chunk(self, chunk: Sequence[Item]) -> list[Grade]:
        worker = self._idle.get()
        try:
            grades: list[Grade] = []
            while len(grades) < len(chunk):
                grades += worker.grade(chunk[len(grades) :])
            return grades
        finally:
            self._idle.put(worker)


class _Worker:
    """A worker is one process at a time, replaced when it is lost. One thread at a time uses it, except for `stop`."""

    def __init__(self, rule: Rule, timeout_seconds: float) -> None:
        self._rule, self._timeout = rule, timeout_seconds
        self._stopped = False
        self._lock = threading.Lock()  # held to start a process, and to stop for good
        self._start()

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Grade the first items, at least one: all of them, unless the process is lost, which ends the list."""
        self._make_ready()
        grades: list[Grade] = []
        try:
            self._send([(response[-WINDOW:], answer) for response, answer in items])
            for _ in items:
                correct, extracted = json.loads(self._line(self._timeout))
                grades.append(Grade(correct, extracted))
        except (WorkerDiedError, TimeoutError):
            grades.append(LOST)
            self._restart()
        return grades

    def stop(self) -> None:
        """Kill the process and start no other. A thread that waits for an answer then gets a GradingError."""
        with self._lock:
            self._stopped = True
            self._process.kill()

    def reap(self) -> None:
        """Kill the process, wait for it and free its pipes."""
        self._process.kill()
        self._process.wait()
        self._input.close()
        self._output.close()

    def _start(self) -> None:
        # The package is found also where it is neither installed nor in the working directory, which -P leaves out.
        root = str(Path(dapo_megatron.__file__).parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-P", "-W", "ignore", "-m", "dapo_megatron.reward.worker"]
        self._process = subprocess.Popen(
            [*command, self._rule, str(self._timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # What sympy does, and how long it takes, can depend on the order of sets.
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
            start_new_session=True,  # out of reach of the terminal's Ctrl-C
        )
        assert self._process.stdin and self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout
        self._buffer = b""
        self._ready = False

    def _make_ready(self) -> None:
        """Wait until the process has done its imports, which no item's time limit should cover."""
        if self._ready and self._process.poll() is not None:
            self._restart()  # it died while idle, over no item
        if self._ready:
            return
        try:
            self._line(STARTUP_SECONDS)
        except (WorkerDiedError, TimeoutError) as error:
            self._raise_if_stopped()
            raise GradingError(
                f"a grading worker for reward.rule={self._rule} did not start within {STARTUP_SECONDS:.0f} s "
                f"(exit code {self._process.poll()}); what it wrote to stderr says why"
            ) from error
        self._ready = True

    def _restart(self) -> None:
        self.reap()
        with self._lock:
            self._raise_if_stopped()
            self._start()

    def _raise_if_stopped(self) -> None:
        if self._stopped:
            raise GradingError("the grading pool was closed while it graded")

    def _send(self, items: Sequence[Item]) -> None:
        # The worker reads a whole line before it answers, so neither side can wait for the other to read.
        line = memoryview(json.dumps(items).encode() + b"\n")
        try:
            while line:
                line = line[self._input.write(line) :]
        except BrokenPipeError as error:
            raise WorkerDiedError from error

    def _line(self, seconds: float) -> bytes:
        """Read the next line that the process writes."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        while b"\n" not in self._buffer:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            read = self._output.read(1 << 16)
            if not read:
                raise WorkerDiedError
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line
