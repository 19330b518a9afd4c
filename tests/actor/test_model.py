"""What Megatron is told about a model on GPUs, without any: its config field by field."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import Qwen2Config

from dapo_megatron.config import MemoryConfig, ModelConfig, ParallelConfig

QWEN_7B = Qwen2Config(
    vocab_size=152_064,
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
)
QWEN_32B = Qwen2Config(
    vocab_size=152_064,
    hidden_size=5120,
    intermediate_size=27_648,
    num_hidden_layers=64,
    num_attention_heads=40,
    num_key_value_heads=8,
)
FUSED = {
    "bf16": True,
    "params_dtype": torch.bfloat16,
    "pipeline_dtype": torch.bfloat16,
    "normalization": "RMSNorm",
    "activation_func": functional.silu,
    "gated_linear_unit": True,
    "bias_activation_fusion": True,
    "apply_rope_fusion": True,
    "gradient_accumulation_fusion": False,  # it would ask for Apex; see accumulate_in_main_grad
    "calculate_per_token_loss": True,
    "variable_seq_lengths": True,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "kv_channels": 128,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}


@pytest.mark.parametrize(
    ("hf_config", "parallel", "memory", "expected"),
    [
        (
            QWEN_7B,
            {},
            {"recompute": "selective"},
            {
                "num_layers": 28,
                "tensor_model_parallel_size": 1,
                "sequence_parallel": False,
                "recompute_granularity": "selective",
                "recompute_modules": ["mlp"],
                "recompute_num_layers": None,
            },
        ),
        (
            QWEN_32B,
            {"tp": 8, "sequence_parallel": True},
            {"recompute": "full", "recompute_layers": 48},
            {
                "num_layers": 64,
                "num_query_groups": 8,
                "tensor_model_parallel_size": 8,
                "sequence_parallel": True,
                "recompute_granularity": "full",
                "recompute_method": "block",
                "recompute_num_layers": 48,
            },
        ),
        (
            QWEN_32B,
            {"tp": 4, "pp": 4, "vpp": 2, "cp": 2, "sequence_parallel": True},
            {"recompute": "full"},
            {
                "pipeline_model_parallel_size": 4,
                "virtual_pipeline_model_parallel_size": 2,
                "context_parallel_size": 2,
                "overlap_p2p_comm": True,
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
        ),
    ],
)
def test_megatrons_config_on_gpus(
    hf_config: Any,
    parallel: dict[str, Any],
    memory: dict[str, Any],
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dapo_megatron.actor.model import transformer_config

    # Megatron looks whether Transformer Engine's kernel is there.
    monkeypatch.setattr("megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb_thd", object())
    model = ModelConfig.model_validate({"path": "x", "layers": "transformer_engine"})
    sizes, saving = ParallelConfig.model_validate(parallel), MemoryConfig.model_validate(memory)
    got = transformer_config(hf_config, model, sizes, saving)
    wanted = FUSED | expected
    assert {name: getattr(got, name) for name in wanted} == wanted


def test_only_transformer_engines_modules_accumulate_in_main_grad() -> None:
    from dapo_megatron.actor.model import accumulate_in_main_grad

    fused = torch.nn.Linear(1, 1)
    fused.fuse_wgrad_accumulation = False  # type: ignore[assignment]
    chunk = torch.nn.Sequential(fused, torch.nn.Linear(1, 1))
    accumulate_in_main_grad([chunk])
    assert [getattr(module, "fuse_wgrad_accumulation", None) for module in chunk] == [True, None]
