"""Knows which models the actor can train and which layouts they allow.

It needs neither megatron nor torch.distributed, so that a run can be refused before any process is started.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dapo_megatron.config import ModelConfig, ParallelConfig
from dapo_megatron.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Family:
    """What is different from one family of models to the next and not said in config.json."""

    qkv_bias: bool = False
    qk_norm: bool = False
    """Whether each query and key is normalised before it is turned by its position."""


FAMILIES = {
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(qk_norm=True),
    "llama": Family(),
    "mistral": Family(),
}
"""`model_type` of the Hugging Face configs that `model.py` builds and `weights.hf` loads."""
SUPPORTED = tuple(FAMILIES)

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
    # Of experts, those that a token goes to.
    columns = mlp_size(hf_config) * (hf_config.num_experts_per_tok if number_of_experts(hf_config) else 1)
    layer = hidden * (2 * queries + 2 * keys + 3 * columns)
    return (layers * layer + hidden * hf_config.vocab_size) / (layers * queries)


def check_layout(hf_config: Any, parallel: ParallelConfig) -> None:
    """Refuse a model that is not supported, or that does not split this way.

    Args:
        hf_config: a config of transformers, as `AutoConfig.from_pretrained` gives it.

    Raises:
        ConfigError: naming the sizes and what would work.
    """
    model_type = getattr(hf_config, "model_type", None)
    if model_type not in SUPPORTED:
        raise _unsupported(model_type)
    _check_variant(hf_config)
    _check_experts(hf_config, parallel.ep)
    _check_key_value_heads(hf_config, parallel.tp)
    tp, stages = parallel.tp, parallel.pp * parallel.vpp
    chunks = f"pp({parallel.pp})" if parallel.vpp == 1 else f"pp({parallel.pp}) x vpp({parallel.vpp}) = {stages}"
    for axis, parts, name in (
        (f"tp({tp})", tp, "num_attention_heads"),
        (f"tp({tp})", tp, "moe_intermediate_size" if number_of_experts(hf_config) else "intermediate_size"),
        (chunks, stages, "num_hidden_layers"),
    ):
        size = getattr(hf_config, name)
        if size % parts:
            raise ConfigError(
                f"parallel: {axis} does not divide the model's {name}({size}); "
                f"choose a divisor of {size}: {', '.join(str(n) for n in range(1, size + 1) if size % n == 0)}"
            )


def check_trains(hf_config: Any, parallel: ParallelConfig) -> None:
    """Refuse what `check_layout` does, and a layout in which the model can be converted but not trained.

    Raises:
        ConfigError: as there.
    """
    check_layout(hf_config, parallel)
    if number_of_experts(hf_config) and parallel.tp > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"parallel: with tp({parallel.tp}), Megatron trains experts only where ranks split the sequence as well; "
            "set sequence_parallel=true"
        )


def _check_experts(hf_config: Any, ep: int) -> None:
    experts = number_of_experts(hf_config)
    if experts is None:
        if ep > 1:
            raise ConfigError(f"parallel: ep({ep}) shares out experts, and {hf_config.model_type!r} has none; set ep=1")
        return
    if experts % ep:
        raise ConfigError(
            f"parallel: ep({ep}) does not divide the model's num_experts({experts}); choose a divisor of {experts}"
        )
    chosen = hf_config.num_experts_per_tok
    if not 1 < chosen <= experts:
        raise ConfigError(
            f"model: num_experts_per_tok is {chosen} in config.json, of num_experts({experts}); 2 to {experts} are "
            "supported"
        )


def _check_key_value_heads(hf_config: Any, tp: int) -> None:
    """Refuse tensor parallel that splits the heads of keys unevenly, or shares them unevenly where it is larger."""
    heads, keys, width = hf_config.num_attention_heads, hf_config.num_key_value_heads, head_size(hf_config)
    rows = (heads + 2 * keys) * width

    def shared_evenly(parts: int) -> bool:
        return keys % parts == 0 or parts % keys == 0

    if not shared_evenly(tp):
        problem = f"is neither a divisor nor a multiple of the model's num_key_value_heads({keys})"
    elif heads % tp == 0 and rows % tp:
        problem = (
            f"does not divide the (num_attention_heads({heads}) + 2 x num_key_value_heads({keys})) x head_dim({width}) "
            f"= {rows} rows of the model's queries, keys and values"
        )
    else:
        return
    works = [n for n in range(1, heads + 1) if heads % n == 0 and shared_evenly(n) and rows % n == 0]
    raise ConfigError(f"parallel: tp({tp}) {problem}; choose one of {', '.join(map(str, works))}")


def check_is_text_model(hf_config: Any) -> None:
    """Refuse a model that is none of attention over tokens alone, whose sizes are elsewhere if anywhere.

    Raises:
        ConfigError: with what is supported.
    """
    if not all(hasattr(hf_config, name) for name in ("num_attention_heads", "hidden_size", "max_position_embeddings")):
        raise _unsupported(hf_config.model_type)


def _unsupported(model_type: str | None) -> ConfigError:
    return ConfigError(f"model: architecture {model_type!r} is not supported; supported: {', '.join(SUPPORTED)}")


def _check_variant(hf_config: Any) -> None:
    for name in ("quantization_config", "compression_config"):
        if (how := getattr(hf_config, name, None)) is not None:
            # transformers keeps it as config.json has it, until a model is made.
            method = how.get("quant_method") if isinstance(how, dict) else getattr(how, "quant_method", None)
            raise ConfigError(
                f"model: the weights are quantised ({name} in config.json says {method or 'no method'}); only weights "
                "as they are trained, in float32, bfloat16 or float16, are supported: take the checkpoint that this "
                "one was made from"
            )
    rope = rope_parameters(hf_config)
    for name, value, allowed in (
        ("rope_parameters.rope_type", rope.get("rope_type", "default"), ("default", "llama3")),
        ("rope_parameters.partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,)),
        ("use_sliding_window", getattr(hf_config, "use_sliding_window", False), (False,)),
        ("sliding_window", getattr(hf_config, "sliding_window", None), (None,)),
        ("hidden_act", hf_config.hidden_act, ("silu",)),
        ("attention_dropout", getattr(hf_config, "attention_dropout", 0.0), (0.0,)),
        ("attention_bias", getattr(hf_config, "attention_bias", False), (False,)),
        ("mlp_bias", getattr(hf_config, "mlp_bias", False), (False,)),
        # Layers without experts among those with them.
        ("decoder_sparse_step", getattr(hf_config, "decoder_sparse_step", 1), (1,)),
        ("mlp_only_layers", tuple(getattr(hf_config, "mlp_only_layers", None) or ()), ((),)),
    ):
        if value not in allowed:
            wanted = f"{' and '.join(map(repr, allowed))} {'are' if len(allowed) > 1 else 'is'} supported"
            raise ConfigError(f"model: {name} is {value!r} in config.json; only {wanted}")


def number_of_experts(hf_config: Any) -> int | None:
    """Return how many experts each layer has; None for a dense model."""
    return getattr(hf_config, "num_experts", None)


def mlp_size(hf_config: Any) -> int:
    """Return the width of a layer's MLP, or of each of its experts."""
    return hf_config.moe_intermediate_size if number_of_experts(hf_config) else hf_config.intermediate_size


def rope_parameters(hf_config: Any) -> dict[str, Any]:
    """Return the settings of the rotary embedding: `rope_theta`, and where they are given `rope_type` and its own."""
    return getattr(hf_config, "rope_parameters", None) or {"rope_theta": hf_config.rope_theta}


def head_size(hf_config: Any) -> int:
    """Return the width of one attention head."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def padded_vocab(vocab_size: int, tp: int) -> int:
    """Return the rows of the embedding over all tensor-parallel ranks, each of which has a multiple of 16."""
    multiple = _VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple
