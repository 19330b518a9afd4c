"""Asks Megatron which tensors a model has in a checkpoint, under which keys, and in which chunks ranks write them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dapo_megatron.config import MemoryConfig, ModelConfig, ParallelConfig
from dapo_megatron.convert.fake_ranks import fake_ranks

_LAYERS, _EXPERTS = "decoder.layers.", ".experts.experts."


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one rank writes of a weight."""

    rank: int
    begin: tuple[int, ...]
    shape: tuple[int, ...]

    def cut(self, weight: Tensor) -> Tensor:
        """Take this chunk out of the whole, which may lack the rows that pad a vocabulary: they are 0."""
        rows = weight[self.begin[0] : self.begin[0] + self.shape[0]]
        for axis, (begin, size) in list(enumerate(zip(self.begin, self.shape, strict=True)))[1:]:
            rows = rows.narrow(axis, begin, size)
        if len(rows) == self.shape[0]:
            return rows
        padded = rows.new_zeros(self.shape)
        padded[: len(rows)] = rows
        return padded


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the model, of one layer and one expert where it is in one, whole over tensor-parallel ranks."""

    key: str
    """In a checkpoint, where all layers have the same, `decoder.layers.mlp.linear_fc2.weight`: one tensor, whose first
    axis counts layers. The second counts experts, in `decoder.layers.mlp.experts.experts.linear_fc2.weight`."""
    place: tuple[int, ...]
    """Where it is along these axes: none, layer, or layer and expert."""
    counts: tuple[int, ...]
    """How long these axes are."""
    shape: tuple[int, ...]
    """Rows that pad the vocabulary included."""
    chunks: tuple[Chunk, ...]

    @property
    def name(self) -> str:
        """In the model, with Transformer Engine's names: `decoder.layers.3.mlp.linear_fc2.weight`, and of an expert
        `decoder.layers.3.mlp.experts.linear_fc2.weight7`."""
        name = self.key_of_layer.replace(_EXPERTS, ".experts.", 1)
        return name + "".join(map(str, self.place[1:]))

    @property
    def key_of_layer(self) -> str:
        """In a checkpoint of a model whose layers differ: each has its own keys, with no axis that counts layers."""
        return self.key.replace(_LAYERS, f"{_LAYERS}{self.place[0]}.", 1) if self.place else self.key


@dataclass(frozen=True, slots=True)
class Layout:
    """A model in a checkpoint that a mesh of ranks writes."""

    weights: tuple[Weight, ...]
    """In the order of the model."""
    objects: dict[str, int]
    """Keys of Megatron's ShardedObjects, all of them empty -> the rank that writes it."""


def megatron_layout(hf_config: Any, parallel: ParallelConfig) -> Layout:
    """Build the model of every rank, without data, and return what its `sharded_state_dict` says.

    Args:
        hf_config: of a model and for sizes that `architecture.check_layout` accepts.
    """
    layers = hf_config.num_hidden_layers
    weights: dict[tuple[str, tuple[int, ...]], Weight] = {}
    objects: dict[str, int] = {}
    for rank in range(_ranks(parallel)):
        for part in _parts_of(hf_config, parallel, rank):
            if hasattr(part, "unique_key"):
                objects[part.unique_key] = rank
                continue
            before = part.prepend_axis_num
            place, counts = tuple(part.global_offset[:before]), tuple(part.global_shape[:before])
            chunk = Chunk(rank, tuple(part.global_offset[before:]), tuple(part.local_shape))
            found = weights.get((part.key, place))
            chunks = (*(found.chunks if found else ()), chunk)
            weights[part.key, place] = Weight(part.key, place, counts, tuple(part.global_shape[before:]), chunks)
    for key, place in list(weights):
        # Norms of their own are modules of Transformer Engine's where that is there, and want an object too.
        if key.endswith("layernorm.weight"):
            shard = f"{place[0]}_{layers}" if place else "0_1"
            objects[f"{key.removesuffix('weight')}_extra_state/shard_{shard}"] = weights[key, place].chunks[0].rank
    return Layout(tuple(sorted(weights.values(), key=_position)), objects)


def _ranks(parallel: ParallelConfig) -> int:
    """With as many replicas as share out experts. Only the first of them writes the rest of the model."""
    return parallel.tp * parallel.pp * parallel.ep


def _position(weight: Weight) -> tuple[int, tuple[int, ...]]:
    order = ("embedding.", _LAYERS, "decoder.", "output_layer.")
    return next(number for number, start in enumerate(order) if weight.key.startswith(start)), weight.place[:1] or (0,)


def _parts_of(hf_config: Any, parallel: ParallelConfig, rank: int) -> Iterator[Any]:
    """Yield the ShardedTensors and ShardedObjects that this rank writes."""
    with fake_ranks(parallel, world_size=_ranks(parallel), rank=rank), torch.device("meta"):
        from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica

        from dapo_megatron.actor.model import build_chunks, transformer_config
        from dapo_megatron.actor.topology import process_groups

        model = ModelConfig.model_validate({"path": ".", "layers": "torch"})
        config = transformer_config(hf_config, model, parallel, MemoryConfig())
        for chunk in build_chunks(hf_config, model, config, process_groups()):
            for part in chunk.sharded_state_dict().values():
                if is_main_replica(part.replica_id):
                    yield from part.build() if isinstance(part, ShardedTensorFactory) else [part]
