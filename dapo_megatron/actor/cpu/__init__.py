"""Makes Megatron-core run without CUDA, or on it without Transformer Engine.

Without CUDA, `enable()` is called once per process, before any model is built. The rest is chosen by `model.py`, where
model.layers is torch: `block_spec` for the layers, `CONFIG` for the switches of kernels that others have.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

CONFIG: dict[str, Any] = {
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
}
"""Fields of TransformerConfig that turn off the kernels which need CUDA, Apex or Transformer Engine."""

_enabled = False


def enable() -> None:
    """Make the megatron.core and mbridge modules of this process run on CPU. Later calls do nothing."""
    global _enabled
    if _enabled:
        return
    from dapo_megatron.actor.cpu import adam, rope, shim, uneven

    shim.install()
    adam.install()
    rope.install()
    uneven.install()
    _route_by_torch()
    _enabled = True


def enable_on_cuda() -> None:
    """Give Megatron what `block_spec` needs on a GPU. Later calls change nothing."""
    from dapo_megatron.actor.cpu import adam, grad_norm, rope

    import_module("megatron.core.models.common.embeddings.rope_utils")
    rope.install()
    import_module("megatron.core.optimizer")
    grad_norm.install()
    if find_spec("transformer_engine") is None:
        adam.install()
        _route_by_torch()


def _route_by_torch() -> None:
    """Megatron's router looks for a product of Transformer Engine's, also where its import has failed."""
    routing: Any = import_module("megatron.core.transformer.moe.moe_utils")
    routing.te_general_gemm = None


def block_spec(config: TransformerConfig, vp_stage: int | None, pp_rank: int) -> TransformerBlockSubmodules:
    """Return the layers of one model chunk: Megatron's own, with attention and norms that CPU has kernels for."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    from dapo_megatron.actor.cpu.attention import PackedAttention
    from dapo_megatron.actor.cpu.norm import RMSNorm

    layer: Any = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm
    )
    if config.num_moe_experts:
        # Megatron would call the norm before a router what it is called before a dense MLP, where Transformer Engine
        # fuses it. In checkpoints of its layers it has a name of its own.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    norm: Any = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)
