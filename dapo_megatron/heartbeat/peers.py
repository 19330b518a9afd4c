"""What a rank sees of the others."""

from __future__ import annotations

import queue
from dataclasses import dataclass
from typing import Any, Protocol

SETTLE_SECONDS = 1.0
"""From a failure elsewhere to its end of this rank. Who fails itself meanwhile, or was started by somebody who saw the
other one die, can say more; and whoever is lost as well is named, too."""


class Store(Protocol):
    """Where ranks find one another (torch.distributed.Store); `get` waits for a value, up to the store's limit."""

    def set(self, key: str, value: str, /) -> Any: ...

    def get(self, key: str, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run ends."""

    reason: str
    """For people; empty where somebody else says it."""
    exit_code: int
    late: bool = False
    """Whether it comes of ranks that waited for another one in vain, so that it matters where each of them is."""


class Peers:
    """The other ranks of the run; there are none in a run of one process, of which this is the whole.

    Attributes:
        letters: what other ranks have sent (`post`), each with the rank that sent it, in its order. The last of a rank
            is None, once its connection has ended or it is missed. At the leader they are those of all ranks,
            elsewhere the leader's.
    """

    def __init__(self) -> None:
        self.letters: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()

    def after_leader(self, what: str) -> None:
        """Return when the leader has come to this call; on the leader, at once.

        All ranks make the same calls in the same order, `leader_says` and `together` included. One goes before every
        collective in which the others would otherwise wait for work that only the leader does, and has no limit: as
        long as the leader lives, it is waited for.

        Raises:
            RuntimeError: where the leader has come to another one.
        """
        self.leader_says(what)

    def leader_says(self, what: str, value: Any = None) -> Any:
        """Return the leader's `value`, which JSON holds, once the leader has come to this call: `after_leader` with an
        answer. What other ranks give does not matter.

        Raises:
            RuntimeError: where the leader has come to another one.
        """
        return value

    def together(self, what: str) -> None:
        """Return when all ranks have come to this call.

        One goes before a collective where ranks differ in how long they take to come there, reading a checkpoint for
        example, and has no limit: as long as all ranks live, they are waited for. The leader's log says for whom.

        Raises:
            RuntimeError: where another rank has come to another call.
        """

    def post(self, rank: int, letter: Any) -> None:
        """Send `letter`, which JSON holds in 100,000 bytes, to `rank`; one of the two is the leader. Does not wait.

        Nothing happens where that rank has left. Can be called on any thread.
        """

    def pass_on(self, signal_name: str) -> bool:
        """On another rank than the leader: let the leader know that this rank was asked to end.

        Returns False where there is no leader any more that could hear it, or whose loss will be told.
        """
        return False

    def whereabouts(self) -> str:
        """Say, on the leader, where the other ranks are, the fewest first: in lines to end a message with."""
        return ""

    def failure(self) -> Failure | None:
        """Why another rank ended or is lost, after waiting as long as it can take to notice that; None if none is."""

    def tell(self, failure: Failure) -> bool:
        """End the run: tell the others that this rank fails. Returns whether somebody else says the reason."""
        return False

    def close(self) -> None:
        """Leave, all being well. Safe to call twice."""
