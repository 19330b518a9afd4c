"""Builds the policy as Megatron's GPTModel, sized by a Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig

from dapo_megatron.actor import cpu
from dapo_megatron.actor.architecture import (
    FAMILIES,
    head_size,
    mlp_size,
    number_of_experts,
    padded_vocab,
    rope_parameters,
    uses_transformer_engine,
)
from dapo_megatron.config import MemoryConfig, ModelConfig, ParallelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(
    hf_config: Any, model: ModelConfig, parallel: ParallelConfig, memory: MemoryConfig
) -> TransformerConfig:
    """Return Megatron's config for this model, which `architecture.check_layout` accepts, and layout."""
    dtype = DTYPES[model.dtype]
    family = FAMILIES[hf_config.model_type]
    virtual = parallel.vpp > 1
    settings: dict[str, Any] = {
        "num_layers": hf_config.num_hidden_layers,
        "hidden_size": hf_config.hidden_size,
        "ffn_hidden_size": mlp_size(hf_config),
        "num_attention_heads": hf_config.num_attention_heads,
        "num_query_groups": hf_config.num_key_value_heads,
        "kv_channels": head_size(hf_config),
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf_config.rms_norm_eps,
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": family.qkv_bias,
        "qk_layernorm": family.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp if virtual else None,
        "context_parallel_size": parallel.cp,
        "sequence_parallel": parallel.sequence_parallel,
        # Micro-batches differ in length, and stages must tell each other how much comes.
        "variable_seq_lengths": True,
        # A dense model has no use for it, but the default one is refused together with variable lengths.
        "moe_token_dispatcher_type": "alltoall",
        # Sums are divided once, by the number of tokens of the whole mini-batch.
        "calculate_per_token_loss": True,
        # Every parameter comes out of the checkpoint. (With perform_initialization off, Megatron would also forget to
        # mark which parameters are split between ranks.)
        "init_method": _leave,
        "output_layer_init_method": _leave,
        "embedding_init_method": _leave,
        "apply_rope_fusion": True,
        # SwiGLU in one kernel that keeps its input only.
        "bias_activation_fusion": True,
        # With several chunks per stage, any other combination gives wrong gradients without a word.
        "overlap_p2p_comm": virtual,
        "batch_p2p_comm": not virtual,
        "deallocate_pipeline_outputs": not virtual,
    }
    if experts := number_of_experts(hf_config):
        settings |= {
            "num_moe_experts": experts,
            "moe_ffn_hidden_size": mlp_size(hf_config),
            "expert_model_parallel_size": parallel.ep,
            "expert_tensor_parallel_size": parallel.tp,
            "moe_router_topk": hf_config.num_experts_per_tok,
            # The softmax over the chosen experts only is that over all of them, normalised again.
            "moe_router_pre_softmax": not hf_config.norm_topk_prob,
            "moe_router_dtype": "fp32",
            # Experts are balanced by nothing: the loss is that of the policy and no more.
            "moe_router_load_balancing_type": "none",
            "moe_grouped_gemm": uses_transformer_engine(model),
        }
    if not uses_transformer_engine(model):
        settings |= cpu.CONFIG
    return TransformerConfig(**settings, **_recompute(memory, "moe" if experts else "mlp"))


def _recompute(memory: MemoryConfig, mlp: str) -> dict[str, Any]:
    """Return Megatron's settings.

    Args:
        mlp: what it calls an MLP, for it would leave out one of experts without a word.
    """
    match memory.recompute, memory.recompute_layers:
        case "none", _:
            return {}
        case "selective", _:
            modules = [mlp if module == "mlp" else module for module in memory.recompute_modules]
            return {"recompute_granularity": "selective", "recompute_modules": modules}
        case _, None:
            return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        case _, layers:
            return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": layers}


def _leave(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def build_chunks(
    hf_config: Any, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection
) -> list[GPTModel]:
    """Build the chunks of the model that this rank holds (one, unless stages are virtual), not initialised."""
    stages = config.virtual_pipeline_model_parallel_size
    fused = uses_transformer_engine(model)
    if not fused and torch.cuda.is_available():
        cpu.enable_on_cuda()
    return [
        _build_chunk(hf_config, config, groups, stage, fused=fused)
        for stage in ([None] if stages is None else range(stages))
    ]


def accumulate_in_main_grad(chunks: Sequence[torch.nn.Module]) -> None:
    """Let modules add weight gradients to Megatron's float32 buffers inside the product itself, where they can.

    Otherwise each micro-batch's gradient is rounded to bfloat16, the dtype of the weights, before it is added.
    Transformer Engine's modules can. Megatron's own, the output layer among them, need Apex's kernel, without which
    Megatron would refuse its switch for all, gradient_accumulation_fusion.
    """
    for module in (module for chunk in chunks for module in chunk.modules()):
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]
        elif isinstance(module, (layers.ColumnParallelLinear, layers.RowParallelLinear)):
            module.gradient_accumulation_fusion = _apex_accumulates(module.config.params_dtype)


def _apex_accumulates(dtype: torch.dtype) -> bool:
    return dtype is torch.bfloat16 and torch.cuda.is_available() and layers._grad_accum_fusion_available


def _build_chunk(
    hf_config: Any, config: TransformerConfig, groups: ProcessGroupCollection, stage: int | None, *, fused: bool
) -> GPTModel:
    pp_rank, last = groups.pp.rank(), groups.pp.size() - 1
    last_stage = (config.virtual_pipeline_model_parallel_size or 1) - 1
    if fused:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        spec: Any = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=stage, pp_rank=pp_rank)
    else:
        spec = cpu.block_spec(config, stage, pp_rank)
    chunk = GPTModel(
        config,
        spec,
        vocab_size=padded_vocab(hf_config.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=pp_rank == 0 and (stage or 0) == 0,
        post_process=pp_rank == last and (stage or 0) == last_stage,
        share_embeddings_and_output_weights=bool(hf_config.tie_word_embeddings),
        position_embedding_type="rope",
        rotary_base=rope_parameters(hf_config)["rope_theta"],
        pg_collection=groups,
        vp_stage=stage,
    )
    _scale_rope(chunk, rope_parameters(hf_config))
    return chunk.cuda() if torch.cuda.is_available() else chunk


def _scale_rope(chunk: GPTModel, rope: Mapping[str, Any]) -> None:
    """Change the frequencies of the rotary embedding as Llama 3.1 does. GPTModel's own switch has but a factor."""
    if rope.get("rope_type") == "llama3":
        embedding: Any = chunk.rotary_pos_emb
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        embedding.inv_freq = embedding._apply_scaling(embedding.inv_freq, **{name: rope[name] for name in names})
