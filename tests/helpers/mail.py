"""Letters between ranks that are threads of this process (`rollout.nodes.Mail`)."""

from __future__ import annotations

import json
import queue
from typing import Any


class Mailbox:
    def __init__(self, rank: int, boxes: list[Mailbox]) -> None:
        self._rank, self._boxes = rank, boxes
        self.letters: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self.sent: list[Any] = []

    def post(self, rank: int, letter: Any) -> None:
        self.sent.append(letter)
        self._boxes[rank].letters.put((self._rank, json.loads(json.dumps(letter))))

    def leave(self) -> None:
        """End the connections of this rank; the leader's are to all others."""
        for box in self._boxes[1:] if self._rank == 0 else self._boxes[:1]:
            box.letters.put((self._rank, None))
        if self._rank:
            self.letters.put((0, None))


def mailboxes(count: int) -> list[Mailbox]:
    boxes: list[Mailbox] = []
    boxes += (Mailbox(rank, boxes) for rank in range(count))
    return boxes
