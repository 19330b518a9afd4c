"""Hands work to engines as they can take it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager


class Admission:
    """Gives out places on engines, first come first served, each on the engine with the least to do.

    An engine that gets everything at once is stuck with what it got, while others run dry; one that gets too little
    does not fill its batch. So it has up to `sequences` that it has not finished, some of which wait over there.

    Args:
        engines: their number.
        sequences: how many an engine may have; one prompt's responses are let in on an idle engine, however many.
    """

    def __init__(self, engines: int, sequences: int) -> None:
        self._sequences = sequences
        self._held = [0] * engines
        """Sequences of every engine whose prompts are not answered."""
        self._finished = [0] * engines
        """How many of those are known to have ended: the responses to a prompt come together, with the longest."""
        self._open = [True] * engines
        self._waiting: deque[tuple[int, asyncio.Future[int]]] = deque()

    @property
    def held(self) -> tuple[int, ...]:
        """Sequences of every engine that were let in and are not answered."""
        return tuple(self._held)

    @asynccontextmanager
    async def place(self, sequences: int) -> AsyncIterator[int]:
        """Wait for a place for that many, and hold it; gives the engine's index."""
        place: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((sequences, place))
        try:
            self._admit()
            yield await place
        finally:
            if place.done() and not place.cancelled():
                engine = place.result()
                self._held[engine] -= sequences
                self._finished[engine] = max(0, self._finished[engine] - sequences)
            self._admit()

    def finished(self, engine: int, sequences: int) -> None:
        """Say how many of the sequences that an engine holds have ended."""
        self._finished[engine] = min(sequences, self._held[engine])
        self._admit()

    def open(self, engines: Collection[int]) -> None:
        """Give out places on these engines only, which others may be no longer, or not yet."""
        self._open = [engine in engines for engine in range(len(self._open))]
        self._admit()

    def _admit(self) -> None:
        while self._waiting and any(self._open):
            sequences, place = self._waiting[0]
            if not place.done():
                load = [held - finished for held, finished in zip(self._held, self._finished, strict=True)]
                engine = min((engine for engine, is_open in enumerate(self._open) if is_open), key=load.__getitem__)
                if load[engine] and load[engine] + sequences > self._sequences:
                    return
                self._held[engine] += sequences
                place.set_result(engine)
            self._waiting.popleft()
