from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from dapo_megatron.actor.architecture import check_layout, head_size, rope_parameters
from dapo_megatron.check_reduction.layouts import STANDARD, Layout
from dapo_megatron.check_reduction.miniature import hf_config
from dapo_megatron.config import ParallelConfig


def own(tp: int = 1) -> Layout:
    return Layout("yours", 1, ParallelConfig(tp=tp))


SMALL = [STANDARD["tp2"], STANDARD["pp2+vpp2"]]


@pytest.mark.parametrize(
    ("layouts", "sharing"),
    [(SMALL, [2]), ([own(tp=4), *SMALL], [4]), ([own(tp=3)], [3]), ([own(tp=3), *SMALL], [2, 3]), ([own()], [])],
    ids=["tp2", "tp4 and 2", "tp3", "tp3 and 2", "tp1"],
)
def test_keys_are_shared_where_they_are_in_the_users_layout(layouts: list[Layout], sharing: list[int]) -> None:
    source = Qwen2Config(num_attention_heads=12, num_key_value_heads=2, hidden_size=1536)
    for shared in (False, True):
        small = hf_config(source, layouts, tied=True, shared_keys=shared)
        for layout in layouts:
            check_layout(small, layout.parallel)
        found = {layout.parallel.tp for layout in layouts if layout.parallel.tp > small.num_key_value_heads}
        assert found == set(sharing if shared else [])


def test_heads_stay_wider_than_the_hidden_size() -> None:
    source = Qwen3Config(num_attention_heads=16, num_key_value_heads=8, hidden_size=1024, head_dim=128)
    small = hf_config(source, SMALL, tied=True)
    assert small.num_attention_heads * head_size(small) == 2 * small.hidden_size
    check_layout(small, SMALL[0].parallel)


def test_the_scaling_of_positions_is_the_users() -> None:
    scaling: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {**scaling, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
    small = hf_config(LlamaConfig(rope_parameters=rope, max_position_embeddings=131_072), SMALL, tied=False)
    assert rope_parameters(small) == rope
