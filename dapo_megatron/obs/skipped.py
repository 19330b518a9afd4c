"""Mini-batches whose update was skipped, kept so that a person can look at them and run them again.

`skipped/step000012-update03.safetensors` in the run's folder holds the tensors of every data-parallel rank as
`rank0.micro_batch2.tokens_T`; its metadata, strings all, are reason, step, update, loss_tokens and ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from dapo_megatron.errors import DapoError
from dapo_megatron.types import MicroBatch, MiniBatch

if TYPE_CHECKING:
    from torch import Tensor

MAX_FILES = 8
"""Per run. A run that goes wrong for good skips one update after the other, and must not fill the disk with them."""


class SkippedFileError(DapoError, ValueError):
    """A file does not hold a mini-batch that `save_skipped` wrote."""


def save_skipped(folder: Path, step: int, update_index: int, reason: str, ranks: Sequence[MiniBatch]) -> Path | None:
    """Write one mini-batch to `folder`/skipped, whole or not at all.

    Args:
        folder: of the run.
        update_index: among the updates of this step, counted from 0 like `step`.
        reason: what was not finite.
        ranks: one MiniBatch per data-parallel rank.

    Returns:
        The file, or None where MAX_FILES are there already.

    Raises:
        OSError: where it cannot be written.
    """
    # torch and what needs it are imported where they are used: the rest of `obs` starts without.
    from safetensors.torch import save

    target = folder / "skipped" / f"step{step:06}-update{update_index:02}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    if len(list(target.parent.glob("*.safetensors"))) >= MAX_FILES:
        return None
    tensors = {
        f"rank{rank}.micro_batch{index}.{name}": tensor
        for rank, update in enumerate(ranks)
        for index, batch in enumerate(update.micro_batches)
        for name, tensor in _tensors(batch).items()
    }
    metadata = {
        "reason": reason,
        "step": str(step),
        "update": str(update_index),
        "loss_tokens": str(ranks[0].loss_tokens),
        "ranks": str(len(ranks)),
    }
    unfinished = target.with_suffix(".unfinished")
    try:
        unfinished.write_bytes(save(tensors, metadata))
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def load_skipped(path: Path) -> list[MiniBatch]:
    """The Updates that `save_skipped` was given, one per data-parallel rank, bit for bit and on CPU.

    Raises:
        SkippedFileError: where `path` is no such file.
    """
    from safetensors import SafetensorError, safe_open

    batches: dict[tuple[int, int], dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            ranks, loss_tokens = int(metadata["ranks"]), int(metadata["loss_tokens"])
            for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                rank, index, name = key.split(".")
                place = int(rank.removeprefix("rank")), int(index.removeprefix("micro_batch"))
                batches.setdefault(place, {})[name] = file.get_tensor(key)
        whole = {place: MicroBatch(**batches[place]) for place in sorted(batches)}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        # The last three: a safetensors file of another kind, or of a version with other fields.
        raise SkippedFileError(f"{path} is not a mini-batch of a skipped update: {error!r}") from error
    return [
        MiniBatch(tuple(batch for (owner, _), batch in whole.items() if owner == rank), loss_tokens)
        for rank in range(ranks)
    ]


def _tensors(batch: MicroBatch) -> dict[str, Tensor]:
    """Field -> tensor, for those that are not None; copies, for safetensors refuses tensors that share memory."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in values.items() if tensor is not None}
