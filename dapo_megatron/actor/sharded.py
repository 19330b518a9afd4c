"""Names what an actor holds as parts of global tensors, which ranks in any other layout can load.

Keys are Megatron's own, the same for layers of Transformer Engine and of torch. The optimizer's state is that of
Megatron's format `fully_reshardable`: moments and main parameters in the shape of the parameters they belong to.
Megatron gathers them on every rank for that. Here each rank names its own slice, as boxes of those tensors, so that
saving and loading take no collective and no memory of a whole replica's state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

EXTRA = "_extra_state"
"""Ends the names of Transformer Engine's records of FP8 scales, which are empty otherwise. Megatron's own layers have
them in name; how many there are depends on what the layers are made of."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a part of a tensor begins, and its shape."""


def sharded_state(
    chunks: Sequence[torch.nn.Module], optimizer: Any, groups: ProcessGroupCollection, *, loading: bool
) -> dict[str, Any]:
    """Return the weights of bare GPTModels and their optimizer's state for Megatron's `dist_checkpointing`.

    Args:
        loading: whether it is to be filled, rather than saved.
    """
    metadata = {"dp_cp_group": groups.dp_cp, "chained_optim_avoid_prefix": True}
    models: list[Any] = list(chunks)
    weights = {f"model{index}": model.sharded_state_dict(metadata=metadata) for index, model in enumerate(models)}
    for part in optimizer.chained_optimizers:
        if not part.optimizer.state:
            _begin(part)
    if not _is_sliced(optimizer):
        return {**weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)}
    states = [
        # By which Megatron's own optimizer knows the rest.
        {**part.state_dict(), "param_state_sharding_type": "fully_reshardable"}
        for part in optimizer.chained_optimizers
    ]
    slices = [_slices(part, weights) for part in optimizer.chained_optimizers]
    return {**weights, "optimizer": _chained(states), "slices": slices}


@torch.no_grad()
def load_sharded_state(chunks: Sequence[torch.nn.Module], optimizer: Any, loaded: dict[str, Any]) -> None:
    """Take over what `dist_checkpointing.load` made of `sharded_state`. It may be changed on the way."""
    for index, chunk in enumerate(chunks):
        absent, unknown = chunk.load_state_dict(loaded[f"model{index}"], strict=False)
        lost = [name for name in (*absent, *unknown) if not name.endswith(EXTRA)]
        assert not lost, f"the sharded state of the model's own names is not the model's: {lost}"
    if not _is_sliced(optimizer):
        optimizer.load_state_dict(loaded["optimizer"])
        return
    saved = _unchained(loaded["optimizer"])
    optimizer.load_state_dict(_chained([_hyperparameters(part, saved) for part in optimizer.chained_optimizers]))
    for part, slices in zip(optimizer.chained_optimizers, loaded["slices"], strict=True):
        for (param, _), states in zip(_own(part), slices, strict=True):
            flat = {name: torch.cat([box.flatten() for box in named]) for name, named in states.items()}
            part._set_main_param_and_optimizer_states(param, flat)


def boxes(begin: int, end: int, shape: Sequence[int]) -> Iterator[Box]:
    """Cut elements `begin` to `end` of a tensor of this shape, in row-major order, into as few boxes, in that order."""
    if begin >= end:
        return
    if len(shape) == 1:
        yield (begin,), (end - begin,)
        return
    row = prod(shape[1:])
    first, last = -(-begin // row), end // row  # whole rows
    if first > last:  # all of it is inside a single row
        yield from _in_row(last, begin, end, shape)
        return
    yield from _in_row(first - 1, begin, first * row, shape)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(last, last * row, end, shape)


def _in_row(index: int, begin: int, end: int, shape: Sequence[int]) -> Iterator[Box]:
    start = index * prod(shape[1:])
    for offset, size in boxes(begin - start, end - start, shape[1:]):
        yield (index, *offset), (1, *size)


def _is_sliced(optimizer: Any) -> bool:
    """Return whether ranks have slices of the state.

    Megatron chains one optimizer, and another one for experts that ranks share out.
    """
    return all(isinstance(part, DistributedOptimizer) for part in optimizer.chained_optimizers)


def _chained(states: list[Any]) -> Any:
    """Return the states of chained optimizers as the chain wants to load them."""
    return states[0] if len(states) == 1 else dict(enumerate(states))


def _unchained(state: Any) -> list[Any]:
    return [state[index] for index in sorted(state)] if 0 in state else [state]


def _hyperparameters(part: Any, saved: list[Any]) -> Any:
    """Return what the saved optimizers have besides tensors in the form that this one reads.

    With another expert parallel size there is another number of them, and groups of parameters say otherwise whether
    they are experts'. Steps and settings are the same in all groups that have weight decay, or have none.
    """
    groups = [group for state in saved for group in state["optimizer"]["param_groups"]]

    def same(group: Any, own: Any) -> bool:
        return all(group.get(name) == own.get(name) for name in ("wd_mult", "lr_mult", "is_decoupled_lr"))

    mine = [
        {**next(group for group in groups if same(group, own)), "is_expert_parallel": own["is_expert_parallel"]}
        for own in part.optimizer.param_groups
    ]
    return {**saved[0], "optimizer": {**saved[0]["optimizer"], "param_groups": mine}}


def _begin(part: Any) -> None:
    """Make moments of zero: an optimizer has them from its first step on."""
    if not part.config.use_precision_aware_optimizer:
        part.init_state_fn(part.optimizer, part.config)
        return
    # Megatron's own function leaves out an argument that Transformer Engine's asks for.
    for param in (param for group in part.optimizer.param_groups for param in group["params"]):
        part.optimizer.initialize_state(param, store_param_remainders=part.config.store_param_remainders)


def _own(part: Any) -> Iterator[tuple[torch.nn.Parameter, Any]]:
    """Yield parameters of which this rank has a slice, with its range among the parameter's elements."""
    for ranges in part.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for param, own in bucket["param_map"].items():
                    yield param, own["param"]


def _slices(part: Any, weights: dict[str, Any]) -> list[dict[str, list[ShardedTensor]]]:
    sharded, _ = extract_sharded_tensors_and_factories(weights)
    whole = {parameter.data: parameter for parameter in nested_values(sharded)}
    return [
        {
            name: _sharded_boxes(whole[param], f"optimizer.state.{name}.{whole[param].key}", tensor, own.start)
            for name, tensor in part._get_main_param_and_optimizer_states(param).items()
            if name != "step"  # which is the parameter group's
        }
        for param, own in _own(part)
    ]


def _sharded_boxes(
    parameter: ShardedTensor | ShardedTensorFactory, key: str, flat: Tensor, begin: int
) -> list[ShardedTensor]:
    """Name `flat`, which belongs to the parameter's elements from `begin` on, as parts of a tensor in its shape."""
    named = []
    for piece in _pieces(parameter):
        first = piece.data.storage_offset()  # the piece's own, among the parameter's elements
        low, high = max(begin - first, 0), min(begin + flat.numel() - first, piece.data.numel())
        for offset, size in boxes(low, high, piece.data.shape):
            start = first - begin + sum(o * stride for o, stride in zip(offset, piece.data.stride(), strict=True))
            leading = piece.prepend_axis_num
            corner = (*(0 for _ in range(leading)), *offset)
            shape = (*(1 for _ in range(leading)), *size)
            named.append(
                replace(
                    piece,
                    key=key,
                    data=flat[start : start + prod(size)].view(shape),
                    dtype=flat.dtype,
                    local_shape=shape,
                    global_offset=tuple(a + b for a, b in zip(piece.global_offset, corner, strict=True)),
                    axis_fragmentations=None,
                    prepend_axis_num=0,
                    # Of the ranks that hold the parameter in data parallel, no other has this.
                    replica_id=(*piece.replica_id[:-1], 0),
                )
            )
    return named


def _pieces(parameter: Any) -> list[Any]:
    """Return the tensors that a parameter is saved as, without data, in the order of its elements."""
    shape = torch.empty_like(parameter.data, device="meta")
    if isinstance(parameter, ShardedTensorFactory):  # gate and up projection, which lie one after the other
        pieces = list(nested_values(replace(parameter, data=shape).build()))
    else:
        pieces = [replace(parameter, data=shape)]
    assert all(piece.data.is_contiguous() for piece in pieces), f"{parameter.key} is not saved row by row"
    return pieces
