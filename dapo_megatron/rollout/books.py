"""What the engines of a run have been asked, what they have not answered, and how much they wrote."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dapo_megatron.measures import Max, Measures, Sum


@dataclass(slots=True)
class Request:
    """Responses to a prompt that are waited for, since some point of `time.monotonic`."""

    uid: str
    since: float
    engine: int | None = None
    """Who works on it; None while it waits for one that can take it."""


class Books:
    """Kept on one thread; `waits` may be called on any."""

    def __init__(self, engines: int) -> None:
        self._open: dict[int, Request] = {}
        """Requests that are not answered, oldest first."""
        self._number = 0
        self._restarts = 0
        self._tokens = [0] * engines
        self._seconds = 0.0
        self._turns: dict[str, float] = {}

    @contextmanager
    def asked(self, uid: str) -> Iterator[Request]:
        """Responses to prompt `uid` are waited for inside."""
        self._number += 1
        number = self._number
        self._open[number] = request = Request(uid, time.monotonic())
        try:
            yield request
        finally:
            del self._open[number]

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """The engines are there to be used inside."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds += time.monotonic() - started

    @contextmanager
    def turning(self, what: str) -> Iterator[None]:
        """The engines go to `sleep`, or `wake` up, inside."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._turns[what] = self._turns.get(what, 0.0) + time.monotonic() - started

    def wrote(self, engine: int, tokens: int) -> None:
        self._tokens[engine] += tokens

    def restarted(self) -> None:
        self._restarts += 1

    def take(self) -> Measures:
        """Return what was counted since the last call (`obs.metrics.METRICS`)."""
        rates = [tokens / self._seconds if self._seconds else 0.0 for tokens in self._tokens]
        restarts, turns = self._restarts, self._turns
        self._restarts, self._seconds, self._tokens, self._turns = 0, 0.0, [0] * len(self._tokens), {}
        return {
            "engine/restarts": Sum(restarts),
            "engine/tokens_per_second_min": Max(min(rates)),
            "engine/tokens_per_second_max": Max(max(rates)),
            **{f"engine/{what}_seconds": Sum(seconds) for what, seconds in turns.items()},
        }

    def waits(self) -> str:
        """Say what is not answered, by engine, and how long the oldest of it has been waited for; "" where all is."""
        now = time.monotonic()
        by_engine: dict[int | None, list[Request]] = {}
        for request in list(self._open.values()):
            by_engine.setdefault(request.engine, []).append(request)
        queued = len(by_engine.pop(None, []))
        parts = [
            f"engine {index} with {len(requests)} prompts (the oldest, {requests[0].uid}, for "
            f"{now - requests[0].since:.0f} s)"
            for index, requests in sorted(by_engine.items(), key=lambda item: item[0] or 0)
        ]
        return ", ".join([*parts, f"{queued} prompts for an engine"] if queued else parts)
