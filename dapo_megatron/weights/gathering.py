"""How ranks gather weights together, at the pace of the leader, who alone uses them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from dapo_megatron.errors import EngineError
from dapo_megatron.weights.buckets import numbered, only_sizes
from dapo_megatron.weights.publish import LeaderSays

Gathered = Iterator[tuple[int, str, Tensor]]
"""As `buckets.numbered` gives them."""

_BUCKET, _AGAIN, _END = "bucket", "again", "end"
"""What the leader says: a bucket is gathered, all are gathered once more, the push is over."""


class Gathering:
    """Every rank has one.

    Args:
        bucket_bytes: the others wait for the leader before each bucket.
        leader_says: see `LeaderSays`.
        use: what every rank does with what it gathers, and passes on. Otherwise only the leader uses it.
    """

    def __init__(
        self, bucket_bytes: int, leader_says: LeaderSays, use: Callable[[Gathered], Gathered] | None = None
    ) -> None:
        self._bucket_bytes, self._leader_says, self._use = bucket_bytes, leader_says, use

    def follow(self, weights: Iterable[tuple[str, Tensor]] | None) -> None:
        """Take part on another rank than the leader until the push is over; keeps one tensor at a time.

        Args:
            weights: None where this rank's replica does not gather.
        """
        said = _AGAIN
        while said != _END:
            if weights is not None:
                deque(self._numbered(weights if self._use else only_sizes(weights)), maxlen=0)
            said = self._leader_says("weights", None)

    @contextmanager
    def leading(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[Passes]:
        """On the leader: whatever engines do inside, the others know at its end that the push is over.

        After any other error they would wait for each other in vain, and it is the run that ends.
        """
        passes = Passes(lambda: self._numbered(weights), lambda said: self._leader_says("weights", said))
        try:
            yield passes
        except EngineError:
            passes.end()
            raise
        passes.end()

    def _numbered(self, weights: Iterable[tuple[str, Tensor]]) -> Gathered:
        gathered = numbered(weights, self._bucket_bytes, lambda: self._leader_says("weights", _BUCKET))
        return self._use(gathered) if self._use else gathered


class Passes:
    """The weights on the leader, gathered as often as `take` is called, and to the end each time, as the others do."""

    def __init__(self, gather: Callable[[], Gathered], say: Callable[[str], object]) -> None:
        self._gather, self._say = gather, say
        self._gathered: Gathered | None = None

    def take(self) -> Gathered:
        """Return the weights from the first one on."""
        if self._gathered is not None:
            self._finish(_AGAIN)
        self._gathered = self._gather()
        return self._gathered

    def end(self) -> None:
        """The push is over."""
        self._finish(_END)

    def _finish(self, said: str) -> None:
        # The others have begun to gather, whether it came to that here or not.
        deque(self._gathered or self._gather(), maxlen=0)
        self._say(said)
