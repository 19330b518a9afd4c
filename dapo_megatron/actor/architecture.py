"""Knows which models the actor can train and which layouts they allow.

It needs neither megatron nor torch.distributed, so that a run can be refused before any process is started.
"""

from __future__ import annotations

from typing import Any

from dapo_megatron.config import ModelConfig, ParallelConfig
from dapo_megatron.errors import ConfigError

SUPPORTED = ("qwen2",)
"""`model_type` of the Hugging Face configs that `model.py` builds and `weights.hf` loads."""

_VOCAB_MULTIPLE = 16
"""Rows of the vocabulary per rank are a multiple of this, which FP8 and tensor cores want."""


def uses_transformer_engine(model: ModelConfig) -> bool:
    """Return whether the layers are Transformer Engine's."""
    import torch

    return (model.layers or ("transformer_engine" if torch.cuda.is_available() else "torch")) == "transformer_engine"


def attention_tokens(hf_config: Any) -> float:
    """Return the length of a sequence at which causal attention costs as much as all matrix products with weights.

    A token costs 2 operations per weight; attention over a sequence of n tokens, 2 x 2 x n/2 per token and query
    channel on average. For Qwen2.5-32B: 97,000 tokens.
    """
    hidden, layers = hf_config.hidden_size, hf_config.num_hidden_layers
    queries = head_size(hf_config) * hf_config.num_attention_heads
    keys = head_size(hf_config) * hf_config.num_key_value_heads
    layer = hidden * (2 * queries + 2 * keys + 3 * hf_config.intermediate_size)
    return (layers * layer + hidden * hf_config.vocab_size) / (layers * queries)


def check_layout(hf_config: Any, parallel: ParallelConfig) -> None:
    """Refuse a model that the actor does not support, or that does not split this way.

    Args:
        hf_config: a config of transformers, as `AutoConfig.from_pretrained` gives it.

    Raises:
        ConfigError: naming the sizes and what would work.
    """
    model_type = getattr(hf_config, "model_type", None)
    if model_type not in SUPPORTED:
        raise ConfigError(f"model: architecture {model_type!r} is not supported; supported: {', '.join(SUPPORTED)}")
    _check_variant(hf_config)
    tp, stages = parallel.tp, parallel.pp * parallel.vpp
    chunks = f"pp({parallel.pp})" if parallel.vpp == 1 else f"pp({parallel.pp}) x vpp({parallel.vpp}) = {stages}"
    for axis, parts, name in (
        (f"tp({tp})", tp, "num_attention_heads"),
        (f"tp({tp})", tp, "num_key_value_heads"),
        (f"tp({tp})", tp, "intermediate_size"),
        (chunks, stages, "num_hidden_layers"),
    ):
        size = getattr(hf_config, name)
        if size % parts:
            raise ConfigError(
                f"parallel: {axis} does not divide the model's {name}({size}); "
                f"choose a divisor of {size}: {', '.join(str(n) for n in range(1, size + 1) if size % n == 0)}"
            )


def _check_variant(hf_config: Any) -> None:
    rope_type = rope_parameters(hf_config).get("rope_type", "default")
    for name, value, wanted in (
        ("rope_parameters.rope_type", rope_type, "default"),
        ("use_sliding_window", getattr(hf_config, "use_sliding_window", False), False),
        ("hidden_act", hf_config.hidden_act, "silu"),
        ("attention_dropout", getattr(hf_config, "attention_dropout", 0.0), 0.0),
    ):
        if value != wanted:
            raise ConfigError(f"model: {name} is {value!r} in config.json; only {wanted!r} is supported")


def rope_parameters(hf_config: Any) -> dict[str, Any]:
    """Return the settings of the rotary embedding, `rope_theta` and where it is given `rope_type`."""
    return getattr(hf_config, "rope_parameters", None) or {"rope_theta": hf_config.rope_theta}


def head_size(hf_config: Any) -> int:
    """Return the width of one attention head."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def padded_vocab(vocab_size: int, tp: int) -> int:
    """Return the rows of the embedding over all tensor-parallel ranks, each of which has a multiple of 16."""
    multiple = _VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple
