"""Counts updates that were skipped because something was not finite, keeps their data, and ends a run with too many.

`skipped/step000012-update03.safetensors` in the run's folder holds the mini-batch: the tensors of every data-parallel
replica as `rank0.micro_batch2.tokens_T`; its metadata, strings all, are reason, step, update, loss_tokens and ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from safetensors.torch import save

from dapo_megatron.actor.topology import Topology
from dapo_megatron.config import Config
from dapo_megatron.errors import DapoError
from dapo_megatron.obs.observer import Observer
from dapo_megatron.state import Kept
from dapo_megatron.types import MiniBatch, UpdateResult

MAX_FILES = 8
"""Files that a run keeps. One that goes wrong for good skips every update, and must not fill the disk with them."""


class NotFiniteError(DapoError, RuntimeError):
    """Too many updates in a row could not be made."""


class SkippedUpdates:
    """Counts skipped updates, alike on every rank; the leader keeps their mini-batches and says so."""

    def __init__(
        self, config: Config, topo: Topology, obs: Observer, after_leader: Callable[[str], object] = lambda what: None
    ) -> None:
        self._limit, self._folder = config.train.max_skipped_updates, config.run.folder
        self._topo, self._obs, self._after_leader = topo, obs, after_leader
        self.in_a_row = Kept(int, 0)

    def seen(self, step: int, index: int, mini_batch: MiniBatch, result: UpdateResult) -> UpdateResult:
        """Take note of update number `index` of its step, made with `mini_batch`. Collective.

        Returns:
            `result`.

        Raises:
            NotFiniteError: at train.max_skipped_updates in a row.
        """
        if result.skipped is None:
            if result.loss_tokens:  # one without loss tokens proves nothing
                self.in_a_row.value = 0
            return result
        self.in_a_row.value += 1
        replicas = self._topo.gather(mini_batch)
        if replicas is not None:
            try:
                path = save_skipped(self._folder, step, index, result.skipped, replicas)
                where = f"its mini-batch is {path}" if path else "and not kept, for skipped/ holds enough of its kind"
            except OSError as error:  # the other ranks wait, and the file is only there to be looked at
                where = f"and could not be kept: {error}"
            self._obs.message(f"step {step}: {result.skipped}; the update was skipped, {where}")
        self._after_leader("skipped update")
        if self.in_a_row.value >= self._limit:
            raise NotFiniteError(
                f"step {step}, update {index}: {result.skipped}, and the update was skipped. That makes "
                f"{self.in_a_row.value} in a row, at which train.max_skipped_updates({self._limit}) ends the run. The "
                f"weights are those of before; the mini-batches are in the run's folder, in skipped/. Look at what "
                f"they hold, or lower optimizer.lr"
            )
        return result


def save_skipped(folder: Path, step: int, update_index: int, reason: str, replicas: Sequence[MiniBatch]) -> Path | None:
    """Write one mini-batch to `folder`/skipped, whole or not at all.

    Args:
        folder: the run's.
        update_index: the number of the update in its step, counted from 0 like `step`.
        reason: what was not finite.
        replicas: the share of every data-parallel replica.

    Returns:
        The file, or None where MAX_FILES are there already.

    Raises:
        OSError: where it cannot be written.
    """
    target = folder / "skipped" / f"step{step:06}-update{update_index:02}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    if len(list(target.parent.glob("*.safetensors"))) >= MAX_FILES:
        return None
    tensors = {
        # Copies: safetensors refuses tensors that share memory.
        f"rank{rank}.micro_batch{index}.{field.name}": tensor.detach().cpu().clone().contiguous()
        for rank, mini_batch in enumerate(replicas)
        for index, batch in enumerate(mini_batch.micro_batches)
        for field in fields(batch)
        if (tensor := getattr(batch, field.name)) is not None
    }
    metadata = {
        "reason": reason,
        "step": str(step),
        "update": str(update_index),
        "loss_tokens": str(replicas[0].loss_tokens),
        "ranks": str(len(replicas)),
    }
    unfinished = target.with_suffix(".unfinished")
    try:
        unfinished.write_bytes(save(tensors, metadata))
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target
