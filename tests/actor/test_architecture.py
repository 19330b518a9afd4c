from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from dapo_megatron.actor.architecture import (
    FAMILIES,
    attention_tokens,
    check_layout,
    check_trains,
    padded_vocab,
    rope_parameters,
)
from dapo_megatron.config import ParallelConfig
from dapo_megatron.errors import ConfigError

QWEN: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def test_attention_costs_as_much_as_the_weights_at_this_length() -> None:
    """Qwen2.5-32B: 2 operations per weight, against 2 x 2 x n/2 per token, layer and query channel."""
    config = Qwen2Config(
        hidden_size=5120,
        intermediate_size=27_648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152_064,
    )
    weights = 64 * 5120 * (5120 + 1024 + 1024 + 5120 + 3 * 27_648) + 5120 * 152_064
    length = attention_tokens(config)
    assert 2 * weights == pytest.approx(64 * 5120 * 2 * 2 * length / 2)


def test_layouts_that_divide_are_accepted() -> None:
    check_layout(Qwen2Config(**QWEN), ParallelConfig())
    check_layout(Qwen2Config(**QWEN), ParallelConfig(tp=2, pp=3, cp=4, sequence_parallel=True))
    sizes = {**QWEN, "num_attention_heads": 8}
    check_layout(Qwen2Config(**sizes), ParallelConfig(tp=8))  # four ranks for each head of keys


def test_rows_of_queries_keys_and_values_have_to_divide() -> None:
    sizes = {**QWEN, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 1}
    with pytest.raises(ConfigError, match=r"tp\(8\) does not divide .* = 12 rows .*; choose one of 1, 2, 4$"):
        check_layout(Qwen3Config(**sizes), ParallelConfig(tp=8))


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"tp": 4}, r"tp\(4\) does not divide the model's num_attention_heads\(6\); choose a divisor of 6: 1, 2, 3, 6"),
        (
            {"tp": 3},
            r"tp\(3\) is neither a divisor nor a multiple of the model's num_key_value_heads\(2\); choose one of 1, 2$",
        ),
        ({"pp": 4}, r"pp\(4\) does not divide the model's num_hidden_layers\(6\)"),
        ({"pp": 2, "vpp": 2}, r"pp\(2\) x vpp\(2\) = 4 does not divide the model's num_hidden_layers\(6\)"),
    ],
)
def test_the_arithmetic_is_in_the_message(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layout(Qwen2Config(**QWEN), ParallelConfig(**parallel))


def test_other_architectures_are_refused_with_the_supported_ones() -> None:
    with pytest.raises(ConfigError, match=f"'gemma' is not supported; supported: {', '.join(FAMILIES)}"):
        check_layout(GemmaConfig(), ParallelConfig())


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"use_sliding_window": True},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ],
)
def test_variants_that_would_be_computed_wrongly_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        check_layout(Qwen2Config(**QWEN, **change), ParallelConfig())


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LlamaConfig, {"mlp_bias": True}, "mlp_bias is True in config.json; only False is supported"),
        (LlamaConfig, {"attention_bias": True}, "attention_bias is True"),
        (Qwen3Config, {"attention_bias": True}, "attention_bias is True"),
        (MistralConfig, {"sliding_window": 4096}, "sliding_window is 4096 in config.json; only None"),
        (
            LlamaConfig,
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'yarn' in config.json; only 'default' and 'llama3' are supported",
        ),
        (
            LlamaConfig,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
    ],
)
def test_so_are_those_of_the_other_families(config: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layout(config(**{**QWEN, **change}), ParallelConfig())


def test_what_a_model_of_experts_needs_to_train() -> None:
    config = Qwen3MoeConfig(**QWEN, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
    check_trains(config, ParallelConfig(tp=2, sequence_parallel=True, ep=4))
    check_layout(config, ParallelConfig(tp=2))
    with pytest.raises(ConfigError, match=r"with tp\(2\), Megatron trains experts only where .*_parallel=true"):
        check_trains(config, ParallelConfig(tp=2))
    with pytest.raises(ConfigError, match=r"ep\(4\) does not divide dp\(3\) x cp\(2\) = 6, the ranks that"):
        ParallelConfig(ep=4, cp=2).data_parallel(6)
    # Of 8 experts, the 2 that a token goes to.
    weights = 6 * 48 * (2 * 48 + 2 * 16 + 3 * 2 * 32) + 48 * config.vocab_size
    assert attention_tokens(config) == weights / (6 * 48)


def test_llama_3_1_as_it_is_published_is_accepted() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {**scaling, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
    published: dict[str, Any] = {"max_position_embeddings": 131_072, "rope_scaling": rope, "rope_theta": 500_000.0}
    config = LlamaConfig(**QWEN, **published, attention_bias=False, mlp_bias=False, pretraining_tp=1)
    check_layout(config, ParallelConfig(tp=2))
    assert rope_parameters(config) == {**rope, "rope_theta": 500_000.0}


@pytest.mark.parametrize(("size", "tp", "padded"), [(32, 1, 32), (32, 2, 32), (33, 2, 64), (151_936, 8, 151_936)])
def test_padded_vocabulary_splits_evenly(size: int, tp: int, padded: int) -> None:
    assert padded_vocab(size, tp) == padded


def test_importing_it_does_not_load_megatron() -> None:
    code = "import sys, dapo_megatron.actor.architecture; print([m for m in ('torch', 'megatron') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantization_config in .* says gptq"),
        ({"quantization_config": {"load_in_8bit": True}}, r"quantization_config in config\.json says no method"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, r"compression_config .* says compressed-tens"),
    ],
)
def test_a_quantised_model_is_refused_with_its_method(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"model: the weights are quantised \({said}"):
        check_trains(Qwen2Config(**QWEN, **values), ParallelConfig())
    check_trains(Qwen2Config(**{**QWEN, "quantization_config": None}), ParallelConfig())
