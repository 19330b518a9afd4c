"""Writes *.safetensors as Hugging Face's folders have them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file

from dapo_megatron.weights.buckets import Named


def write_tensors(weights: Iterable[Named], folder: Path) -> None:
    """Write each entry of `weights` as a shard, and the index of several.

    Args:
        weights: contiguous tensors on CPU that share no memory.

    Raises:
        OSError, SafetensorError: where they cannot be written.
    """
    shards: list[list[str]] = []
    total_bytes = 0
    for shard in weights:
        path = folder / f"model-{len(shards) + 1:05d}.safetensors"
        save_file(dict(shard), path, metadata={"format": "pt"})
        _let_others_read(path)
        shards.append([name for name, _ in shard])
        total_bytes += sum(tensor.nbytes for _, tensor in shard)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        final = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"model-{number:05d}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _let_others_read(path: Path) -> None:
    """Give a file the mode that any other here would have: safetensors makes it for its owner alone."""
    other = path.with_suffix(".mode")
    other.touch()
    path.chmod(other.stat().st_mode)
    other.unlink()
