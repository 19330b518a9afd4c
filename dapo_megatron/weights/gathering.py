"""How ranks gather weights together, at the pace of the leader, who alone uses them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator

from torch import Tensor

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
    """

    def __init__(self, bucket_bytes: int, leader_says: LeaderSays) -> None:
        self._bucket_bytes, self._leader_says = bucket_bytes, leader_says

    def follow(self, weights: Iterable[tuple[str, Tensor]] | None) -> None:
        """Take part on another rank than the leader until the push is over; keeps one tensor at a time.

        Args:
            weights: None where this rank's replica does not gather.
        """
        said = _AGAIN
        while said != _END:
            if weights is not None:
                deque(self._numbered(only_sizes(weights)), maxlen=0)
            said = self._leader_says("weights", None)

    def passes(self, weights: Iterable[tuple[str, Tensor]]) -> Generator[Gathered]:
        """Yield, on the leader, the weights, gathered anew each time, and to the end, as the others do.

        To be closed, also after a failure: then the others know that the push is over.
        """
        while True:
            gathered, said = self._numbered(weights), _END
            try:
                yield gathered
                said = _AGAIN
            finally:
                deque(gathered, maxlen=0)
                self._leader_says("weights", said)

    def _numbered(self, weights: Iterable[tuple[str, Tensor]]) -> Gathered:
        return numbered(weights, self._bucket_bytes, lambda: self._leader_says("weights", _BUCKET))
