"""Makes a small model with the settings of the user's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dapo_megatron.actor.architecture import head_size, number_of_experts
from dapo_megatron.check_reduction.layouts import Layout
from dapo_megatron.config import Config

VOCAB = 211
"""Tokens of the vocabulary: no multiple of 16, so that Megatron pads it."""
HEAD = 16
EXPERTS, CHOSEN = 8, 4
"""Of a layer, and for a token. With two for a token, a router's gradient there is the difference of what these two have
given: one number, of which rounding is all that is left now and then.
"""
OPTIMIZER = {
    "lr": 1e-2,
    "eps": 1e-3,
    # How Adam's state is kept changes no gradient; some layouts have an optimizer that cannot keep it so.
    "precision_aware": False,
    "exp_avg_dtype": "float32",
    "exp_avg_sq_dtype": "float32",
}
"""Adam divides by the root of its second moment plus eps. With a small eps it blows rounding up to a whole step where
the gradient is about 0, and parameters say nothing about the gradient."""

MAX_DECAY = 1.0
"""With the miniature's rate, more could take all of a weight away."""


def hf_config(source: Any, layouts: Sequence[Layout], *, tied: bool, shared_keys: bool = False) -> Any:
    """Make `source` small: as many layers, heads and columns as the layouts need, all else as it is.

    Args:
        shared_keys: whether there are fewer heads of keys than tensor-parallel ranks, in layouts where that can be.
    """
    from transformers import AutoConfig

    splits = [layout.parallel.tp for layout in layouts]
    tp = math.lcm(*splits)
    stages = math.lcm(*(layout.parallel.pp * layout.parallel.vpp for layout in layouts))
    groups, head = max(tp, 2), HEAD
    if shared_keys:
        head = math.lcm(HEAD, tp)  # ranks split the rows of a shared head
        groups = max(n for n in range(1, max(*splits, 2)) if all(n % tp == 0 or tp % n == 0 for tp in splits))
    heads = groups * min(4, max(1, source.num_attention_heads // source.num_key_value_heads))
    heads = math.lcm(heads, tp)
    # Heads may be wider, all together, than the hidden size.
    width = source.hidden_size / (source.num_attention_heads * head_size(source))
    values = source.to_dict()
    values |= {
        "num_hidden_layers": max(stages, 2),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head,
        "hidden_size": 8 * max(1, round(heads * head * width / 8)),
        "intermediate_size": 3 * heads * head // 2,
        "vocab_size": VOCAB,
        "tie_word_embeddings": tied,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if number_of_experts(source):
        experts = math.lcm(EXPERTS, *(layout.parallel.ep for layout in layouts))
        values |= {"num_experts": experts, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": heads * head // 2}
    # One entry for each layer, in the families that have them; None is for what follows from the rest.
    of_layers = {"max_window_layers": max(stages, 2), "layer_types": None}
    values |= {name: value for name, value in of_layers.items() if name in values}
    return AutoConfig.for_model(values.pop("model_type"), **values)


def save_model(config: Any, folder: Path, dtype: torch.dtype) -> None:
    """Save random weights that `dtype` holds exactly; biases and norms too, so that a forgotten one shows."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
    model.to(dtype).save_pretrained(folder)


def run_config(config: Config, layout: Layout, model: Path, dtype: str) -> Config:
    """Return the user's config with this model and layout."""
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": model, "dtype": dtype, "trust_remote_code": False}),
            "parallel": layout.parallel,
            "optimizer": config.optimizer.model_copy(
                update={**OPTIMIZER, "weight_decay": min(config.optimizer.weight_decay, MAX_DECAY)}
            ),
            # Larger passes for log-probs have a first ratio of 1 up to rounding only.
            "train": config.train.model_copy(update={"logprob_tokens": None}),
        }
    )
