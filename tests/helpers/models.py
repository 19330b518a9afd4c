"""Tiny random Hugging Face checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dapo_megatron.check_reduction.miniature import save_model
from dapo_megatron.config import Config
from tests.helpers.checkpoint import TINY

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    # As in the real ones, heads are wider than the hidden size has room for.
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "llama": {"model_type": "llama"},
    # Of the 4 frequencies of a head, one is kept, one is divided and two are between.
    "llama3": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
}
"""What the configs of the families say besides TINY."""


def save_tiny(
    folder: Path,
    family: str = "qwen2",
    *,
    tied: bool = True,
    layers: int = 2,
    hidden: int = 32,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """Saves a random model whose biases and norms are random too, so that swapped or forgotten tensors show."""
    from transformers import AutoConfig

    sizes = {"tie_word_embeddings": tied, "num_hidden_layers": layers, "hidden_size": hidden}
    values = {**TINY, **FAMILIES[family], **sizes, "bos_token_id": None, "eos_token_id": None, **changes}
    save_model(AutoConfig.for_model(**values), folder, dtype)
    (folder / "tokenizer_config.json").write_text("{}\n")
    return folder


def save_qwen2(folder: Path, **settings: Any) -> Path:
    """Saves `save_tiny`'s Qwen2."""
    return save_tiny(folder, "qwen2", **settings)


def load_reference(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """Loads the Hugging Face model of a checkpoint."""
    from transformers import AutoModelForCausalLM

    # Other implementations of experts have no float64.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


def make_config(checkpoint: Path, /, **sections: dict[str, Any]) -> Config:
    """Makes a whole config around one checkpoint, in float32 unless `model` in `sections` says otherwise."""
    settings: dict[str, Any] = {name: dict(section) for name, section in sections.items()}
    settings["model"] = {"path": checkpoint, "dtype": "float32", **settings.get("model", {})}
    settings.setdefault("data", {"train": "unused.jsonl", "max_prompt_tokens": 64})
    settings.setdefault("train", {"mini_batch": 8})
    settings["rollout"] = {"prompts": 4, "responses": 2, "max_response_tokens": 64, **settings.get("rollout", {})}
    settings.setdefault("reward", {"overlong": {"punishment": False}})
    return Config.model_validate(settings)
