"""Which transports of weights can be, by where ranks and engines are."""

from __future__ import annotations

from dapo_megatron.config import Config
from dapo_megatron.errors import ConfigError

_BETWEEN_GPUS = ("nccl", "ipc")


def check_transport(config: Config, world_size: int, ranks_here: int) -> None:
    """Refuse a transport that cannot be.

    Args:
        world_size: ranks of the run; 0 where nothing is trained.
        ranks_here: those on this machine.

    Raises:
        ConfigError: says why, and which to take.
    """
    import torch

    transport, placement = config.weights.transport, config.engine.placement
    if transport not in _BETWEEN_GPUS:
        return
    if not torch.cuda.device_count():
        raise ConfigError(
            f"weights.transport={transport} moves weights between memories of GPUs, and torch sees no GPU here; set "
            f"weights.transport=gloo"
        )
    if transport == "nccl":
        if placement == "colocated":
            raise ConfigError(
                "weights.transport=nccl: with engine.placement=colocated an engine is on the GPU of rank 0, which "
                "sends, and NCCL refuses two members of a group on one GPU; set weights.transport=ipc, or gloo where "
                "ranks are on several machines"
            )
        return
    shares = "weights.transport=ipc hands on memory of a GPU that a rank and an engine share, but"
    if not world_size:
        raise ConfigError(
            f"{shares} `dapo-megatron engines` trains nothing; set weights.transport=nccl or gloo, here and in the run"
        )
    if placement != "colocated":
        raise ConfigError(
            f"{shares} engine.placement is {placement}; set weights.transport=nccl, or engine.placement=colocated"
        )
    if ranks_here != world_size:
        raise ConfigError(
            f"weights.transport=ipc: memory is handed on within one machine, but of {world_size} ranks {ranks_here} "
            f"are on this one; set weights.transport=gloo, or start all ranks here"
        )
