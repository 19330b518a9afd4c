"""The environment of an engine's processes, whatever its kind."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from dapo_megatron.config import EngineConfig
from dapo_megatron.rollout.place import Place

_OF_THE_RANKS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|(OMP|MKL)_NUM_THREADS"
)
"""What torchrun and the command line put into the environment; an engine would take it for its own."""


def environment(engine: EngineConfig, place: Place, inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The trainer's environment without what was put there for the ranks, and with what the engine's place asks for."""
    env = {name: value for name, value in inherited.items() if not _OF_THE_RANKS.fullmatch(name)}
    env["HF_HUB_OFFLINE"] = "1"
    if place.gpus:
        # Where another engine is gone, a push over NCCL breaks off in all of them. Torch would have each write a dump,
        # and end it minutes later (`weights.group.let_us_end_transmissions`).
        return {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0"} | env | {"CUDA_VISIBLE_DEVICES": ",".join(place.gpus)}
    return env | {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // (engine.count * engine.tensor_parallel))),
        # Spinning threads would take the cores from the trainer, which waits while we work and works while we wait.
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
    }
