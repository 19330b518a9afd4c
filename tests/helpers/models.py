"""Tiny random Hugging Face checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dapo_megatron.config import Config


def save_qwen2(
    folder: Path,
    *,
    tied: bool = True,
    seed: int = 7,
    vocab_size: int = 50,
    hidden: int = 32,
    ffn: int = 48,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A random Qwen2 whose biases and norms are random too, so that swapped or forgotten tensors show.

    The default vocabulary is no multiple of 16, so that Megatron pads it.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    generator = torch.Generator().manual_seed(seed)
    model: Any = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}\n")
    return folder


def load_reference(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The Hugging Face model of a checkpoint."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def make_config(checkpoint: Path, /, **sections: dict[str, Any]) -> Config:
    """A whole config around one checkpoint, in float32 unless `model` in `sections` says otherwise."""
    settings: dict[str, Any] = {name: dict(section) for name, section in sections.items()}
    settings["model"] = {"path": checkpoint, "dtype": "float32", **settings.get("model", {})}
    settings.setdefault("data", {"train": "unused.jsonl", "max_prompt_tokens": 64})
    settings.setdefault("train", {"mini_batch": 8})
    settings["rollout"] = {"prompts": 4, "responses": 2, "max_response_tokens": 64, **settings.get("rollout", {})}
    settings.setdefault("reward", {"overlong": {"punishment": False}})
    return Config.model_validate(settings)
