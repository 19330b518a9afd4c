"""What Megatron is told about a model on GPUs, without any: its config field by field."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from dapo_megatron.config import MemoryConfig, ModelConfig, ParallelConfig
from tests.helpers.batches import make_micro_batch, make_mini_batch, ratio_loss, worst_relative_error
from tests.helpers.models import make_config, save_qwen2

QWEN_MOE = Qwen3MoeConfig.from_dict({"hidden_size": 2048, "head_dim": 128, "norm_topk_prob": True})
"""Sizes of Qwen3-30B-A3B, which are transformers' defaults."""
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


@pytest.mark.parametrize(
    ("hf_config", "expected"),
    [
        (QWEN_7B, {"add_qkv_bias": True, "qk_layernorm": False}),
        (
            Qwen3Config(hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128),
            {"add_qkv_bias": False, "qk_layernorm": True, "kv_channels": 128},
        ),
        (
            LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8),
            {"add_qkv_bias": False, "qk_layernorm": False, "kv_channels": 128, "num_query_groups": 8},
        ),
    ],
    ids=["qwen2", "qwen3", "llama"],
)
def test_megatrons_config_of_a_family(hf_config: Any, expected: dict[str, Any]) -> None:
    from dapo_megatron.actor.model import transformer_config

    model = ModelConfig.model_validate({"path": "x", "layers": "torch"})
    got = transformer_config(hf_config, model, ParallelConfig(), MemoryConfig())
    assert {name: getattr(got, name) for name in expected} == expected


def test_only_transformer_engines_modules_accumulate_in_main_grad() -> None:
    from dapo_megatron.actor.model import accumulate_in_main_grad

    fused = torch.nn.Linear(1, 1)
    fused.fuse_wgrad_accumulation = False  # type: ignore[assignment]
    chunk = torch.nn.Sequential(fused, torch.nn.Linear(1, 1))
    accumulate_in_main_grad([chunk])
    assert [getattr(module, "fuse_wgrad_accumulation", None) for module in chunk] == [True, None]


def wgrad_gemm_accum_fp32(inputs_TI: Tensor, grads_TO: Tensor, main_grad_OI: Tensor) -> None:
    """What Apex's kernel does."""
    assert inputs_TI.is_contiguous() and grads_TO.is_contiguous()
    main_grad_OI.addmm_(grads_TO.float().t(), inputs_TI.float())


@pytest.mark.parametrize("tied", [True, False])
def test_apexs_kernel_gets_the_gradients_of_megatrons_own_layers(
    alone: Any, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.tensor_parallel import layers

    from dapo_megatron.actor import model
    from dapo_megatron.actor.actor import Actor
    from dapo_megatron.weights.hf import HfCheckpoint

    checkpoint = HfCheckpoint(save_qwen2(tmp_path, tied=tied, dtype=torch.bfloat16))
    config = make_config(tmp_path, model={"dtype": "bfloat16"})
    batches = [make_micro_batch([5, 130, 1, 90, 40], seed=1), make_micro_batch([200], seed=2)]
    calls = []

    def kernel(*tensors: Tensor) -> None:
        calls.append([tensor.shape for tensor in tensors])
        wgrad_gemm_accum_fp32(*tensors)

    def gradient(fused: bool) -> dict[str, Tensor]:
        monkeypatch.setattr(model, "_apex_accumulates", lambda dtype: fused)
        actor = Actor(config, alone, checkpoint)
        (mini_batch,), _ = actor.with_old_logprobs([make_mini_batch(batches)])
        actor.gradient(mini_batch, ratio_loss)
        named: dict[str, Any] = dict(actor.chunks[0].named_parameters())
        added = {name for name, param in named.items() if param.grad_added_to_main_grad}
        weights = {name for name, param in named.items() if param.ndim == 2 and "embedding" not in name}
        assert added == (weights | ({"embedding.word_embeddings.weight"} if tied else set()) if fused else set())
        return {name: param.main_grad.clone() for name, param in named.items()}

    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", SimpleNamespace(wgrad_gemm_accum_fp32=kernel), False)
    want, got = gradient(False), gradient(True)
    rows = {shapes[0][0] for shapes in calls if shapes[2] == (64, 32)}
    assert rows >= {int(batch.scored_T.sum()) for batch in batches}
    for name, grad in want.items():
        assert worst_relative_error({name: got[name]}, {name: grad}) < 2e-2


def test_apex_is_for_bfloat16_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel import layers

    from dapo_megatron.actor.model import _apex_accumulates

    def accumulates(apex: bool, gpu: bool, dtype: torch.dtype) -> bool:
        monkeypatch.setattr(layers, "_grad_accum_fusion_available", apex)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        return _apex_accumulates(dtype)

    assert accumulates(True, True, torch.bfloat16)
    assert not accumulates(False, True, torch.bfloat16)
    assert not accumulates(True, False, torch.bfloat16)
    assert not accumulates(True, True, torch.float32)


def test_experts_are_routed_as_hugging_face_routes_and_recomputed_as_such() -> None:
    from dapo_megatron.actor.model import transformer_config

    model = ModelConfig.model_validate({"path": ".", "layers": "torch"})
    memory = MemoryConfig(recompute="selective", recompute_modules=["mlp", "core_attn"])
    config = transformer_config(QWEN_MOE, model, ParallelConfig(tp=2, ep=4, sequence_parallel=True), memory)
    assert (config.num_moe_experts, config.moe_router_topk, config.moe_ffn_hidden_size) == (128, 8, 768)
    assert (config.expert_model_parallel_size, config.expert_tensor_parallel_size) == (4, 2)
    assert (config.moe_router_dtype, config.moe_router_pre_softmax) == ("fp32", False)
    assert (config.moe_router_load_balancing_type, config.moe_aux_loss_coeff) == ("none", 0)
    assert config.recompute_modules == ["moe", "core_attn"]
    unnormalised = Qwen3MoeConfig(norm_topk_prob=False)
    assert transformer_config(unnormalised, model, ParallelConfig(), MemoryConfig()).moe_router_pre_softmax
