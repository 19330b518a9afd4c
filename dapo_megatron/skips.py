"""Updates that were skipped because something was not finite: kept for inspection, and too many of them end the run."""

from __future__ import annotations

from dapo_megatron.actor import topology
from dapo_megatron.actor.topology import Topology
from dapo_megatron.errors import DapoError
from dapo_megatron.leader import Leader
from dapo_megatron.types import MiniBatch, UpdateResult


class NotFiniteError(DapoError, RuntimeError):
    """Too many updates in a row could not be made."""


class SkipWatch:
    """Counts skipped updates, alike on every rank.

    Args:
        limit: skipped updates in a row that end the run.
        leader: on the leader, itself; it writes the files.
    """

    def __init__(self, limit: int, topo: Topology, leader: Leader | None) -> None:
        self._limit, self._topo, self._leader = limit, topo, leader
        self._in_a_row = 0

    def seen(self, step: int, index: int, update: MiniBatch, result: UpdateResult) -> UpdateResult:
        """Collective: to be called with every update, number `index` of its step, and what came of it.

        Returns:
            `result`.

        Raises:
            NotFiniteError: at the limit.
        """
        if result.skipped is None:
            if result.loss_tokens:  # one without loss tokens proves nothing
                self._in_a_row = 0
            return result
        self._in_a_row += 1
        ranks = topology.gather(update, self._topo)
        if self._leader and ranks is not None:
            self._leader.keep_skipped(step, index, result.skipped, ranks)
        if self._in_a_row >= self._limit:
            raise NotFiniteError(
                f"step {step}, update {index}: {result.skipped}, and the update was skipped. That makes "
                f"{self._in_a_row} in a row, at which train.max_skipped_updates({self._limit}) ends the run. The "
                f"weights are those of before; the mini-batches are in the run's folder, in skipped/. Look at what "
                f"they hold, or lower optimizer.lr"
            )
        return result
