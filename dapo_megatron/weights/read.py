"""Fills Megatron models from *.safetensors: some ranks read, the others get it from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from dapo_megatron.errors import ConfigError
from dapo_megatron.weights.buckets import buckets

_BUCKET_BYTES = 128 << 20
"""What goes to the other replicas in one message at the most."""


def held(bridge: Any, chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, list[str], Tensor]]:
    """Yield what this rank's GPTModels hold: Megatron's name, the Hugging Face tensors that go into it, the parameter.

    Layers are counted over all stages; a parameter is this rank's own part of it.
    """
    for chunk in chunks:
        params = chunk.state_dict()
        for local, name in bridge._weight_name_mapping_mcore_local_to_global(chunk).items():
            yield name, bridge._weight_name_mapping_mcore_to_hf(name), params[local]


def is_expert(name: str) -> bool:
    """Return whether this is one expert's, by the name that `held` gives."""
    return ".mlp.experts." in name


@torch.no_grad()
def fill(
    bridge: Any,
    chunks: Sequence[torch.nn.Module],
    files: Mapping[str, Path],
    wanted: Callable[[str], bool] = lambda name: True,
) -> None:
    """Read this rank's part of every tensor that it holds and that is `wanted`. No other rank takes part.

    Files are mapped: ranks of one machine that want parts of the same tensor read it once from the disk, and beside the
    model a rank needs memory for a tensor or two.

    Args:
        files: where each Hugging Face tensor is (`hf_folder.tensor_files`).

    Raises:
        ConfigError: for a tensor that has not the shape that config.json says.
    """
    mpu = bridge.mpu
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}

        def read(name: str) -> Tensor:
            file = files[name]
            if file not in opened:
                opened[file] = stack.enter_context(safe_open(file, framework="pt"))
            return opened[file].get_tensor(name)

        for name, sources, param in held(bridge, chunks):
            if not wanted(name):
                continue
            tensors = [read(source) for source in sources]
            try:
                whole = bridge._weight_to_mcore_format(name, tensors)
                part = bridge._weight_split_across_tp(name, whole, param, mpu.tp_size)[mpu.tp_rank]
            except RuntimeError as error:
                raise _wrong_shape(sources, tensors) from error
            if part.shape != param.shape:
                raise _wrong_shape(sources, tensors)
            param.copy_(part)


def _wrong_shape(names: Sequence[str], tensors: Sequence[Tensor]) -> ConfigError:
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in zip(names, tensors, strict=True))
    return ConfigError(f"model.path: the weights are not those of config.json, which wants other shapes: {shapes}")


@torch.no_grad()
def share(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Give all ranks of `group` what its first rank has in these contiguous tensors, bit for bit. Collective."""
    if group.size() == 1:
        return
    for bucket in buckets(((str(index), tensor) for index, tensor in enumerate(tensors)), _BUCKET_BYTES):
        parts = [tensor.view(-1).view(torch.uint8) for _, tensor in bucket]
        flat = torch.cat(parts) if len(parts) > 1 else parts[0]
        for piece in flat.split(_BUCKET_BYTES):
            dist.broadcast(piece, group_src=0, group=group)
        if len(parts) > 1 and group.rank() != 0:
            for part, came in zip(parts, flat.split([len(part) for part in parts]), strict=True):
                part.copy_(came)
