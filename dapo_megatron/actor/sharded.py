"""Names what an actor holds as parts of global tensors, which ranks in any other layout can load.

Keys are Megatron's own, the same for layers of Transformer Engine and of torch. The optimizer's state is that of
Megatron's format `fully_reshardable`: moments and main parameters in the shape of the parameters they belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

EXTRA = "_extra_state"
"""Ends the names of Transformer Engine's records of FP8 scales, which are empty otherwise. Megatron's own layers have
them in name; how many there are depends on what the layers are made of."""


def sharded_state(
    chunks: Sequence[torch.nn.Module], optimizer: Any, groups: ProcessGroupCollection, *, loading: bool
) -> dict[str, Any]:
    """Return the weights of bare GPTModels and their optimizer's state for Megatron's `dist_checkpointing`. Collective.

    Args:
        loading: whether it is to be filled, rather than saved.
    """
    metadata = _metadata(groups)
    models: list[Any] = list(chunks)
    weights = {f"model{index}": model.sharded_state_dict(metadata=metadata) for index, model in enumerate(models)}
    if not loading:
        _begin(optimizer)
    state = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
    return {**weights, "optimizer": state}


@torch.no_grad()
def load_sharded_state(chunks: Sequence[torch.nn.Module], optimizer: Any, loaded: dict[str, Any]) -> None:
    """Take over what `dist_checkpointing.load` made of `sharded_state`. It may be changed on the way."""
    for index, chunk in enumerate(chunks):
        absent, unknown = chunk.load_state_dict(loaded[f"model{index}"], strict=False)
        lost = [name for name in (*absent, *unknown) if not name.endswith(EXTRA)]
        assert not lost, f"the sharded state of the model's own names is not the model's: {lost}"
    optimizer.load_state_dict(loaded["optimizer"])


def _metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": groups.dp_cp,
    }


def _begin(optimizer: Any) -> None:
    """Make moments of zero where there are none: an optimizer has them from its first step on."""
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer and not part.optimizer.state:
            part.init_state_fn(part.optimizer, part.config)
