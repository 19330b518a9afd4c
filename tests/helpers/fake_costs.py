"""What tests of fake ranks share: sizes of models, and one rank's cost under fake or real ranks, in other processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dapo_megatron.check_reduction.pool import RankPool
from dapo_megatron.config import Config
from tests.helpers.checkpoint import TINY
from tests.helpers.fake_mesh import RankCost, fake_rank_cost, real_rank_cost
from tests.helpers.models import make_config

POOL = RankPool()
"""Apart from the other tests' ranks: these see no GPU."""

_COMMON = {"model_type": "qwen2", "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"model_type": "qwen2", **TINY, "tie_word_embeddings": False},
    "tiny-tied": {"model_type": "qwen2", **TINY},
    "larger": {
        "model_type": "qwen2",
        **TINY,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "tie_word_embeddings": False,
    },
    "7B": {
        **_COMMON,
        "hidden_size": 3_584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
    "32B": {
        **_COMMON,
        "hidden_size": 5_120,
        "intermediate_size": 27_648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
}
SIZES["qwen3"] = {**SIZES["tiny"], "model_type": "qwen3", "head_dim": 16}
SIZES["llama"] = {**SIZES["tiny"], "model_type": "llama"}
SLOTS = (64, 64)
"""Of the sequences of a micro-batch."""


@contextmanager
def without_gpus() -> Iterator[None]:
    """Hides GPUs from the processes of POOL, and ends them."""
    with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
        yield
    POOL.close()


def tiny_config(parallel: dict[str, Any], dtype: str = "bfloat16", recompute: str = "none") -> Config:
    model, memory = {"dtype": dtype}, {"recompute": recompute}
    return make_config(Path("unused"), model=model, memory=memory, parallel=parallel, train={"mini_batch": 8})


def fake(size: str, config: Config, world_size: int, rank: int, lengths: tuple[int, ...], **more: int) -> RankCost:
    return POOL.run(1, fake_here, SIZES[size], config, world_size, rank, lengths, more, timeout=200)[0]


def fake_here(size: Any, config: Config, world: int, rank: int, lengths: Any, more: dict[str, int]) -> RankCost:
    """Does in this process what `fake` does in another."""
    return fake_rank_cost(size, config, world_size=world, rank=rank, lengths=lengths, **more)


def real(size: str, config: Config, world_size: int, lengths: tuple[int, ...], **more: int) -> list[RankCost]:
    return POOL.run(world_size, _real, SIZES[size], config, lengths, more, timeout=120)


def _real(size: Any, config: Config, lengths: Any, more: dict[str, int]) -> RankCost:
    from dapo_megatron.actor import topology

    topo = topology.initialize(config.parallel)
    cost = real_rank_cost(size, config, topo, lengths=lengths, **more)
    topology.shutdown()
    return cost
