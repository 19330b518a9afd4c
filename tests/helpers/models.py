"""Tiny random Hugging Face checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dapo_megatron.check_reduction.miniature import save_model
from dapo_megatron.config import Config
from tests.helpers.checkpoint import TINY


def save_qwen2(
    folder: Path, *, tied: bool = True, layers: int = 2, hidden: int = 32, dtype: torch.dtype = torch.float32
) -> Path:
    """Saves a random Qwen2 whose biases and norms are random too, so that swapped or forgotten tensors show."""
    from transformers import Qwen2Config

    changes = {"tie_word_embeddings": tied, "num_hidden_layers": layers, "hidden_size": hidden}
    save_model(Qwen2Config(**{**TINY, **changes}, bos_token_id=None, eos_token_id=None), folder, dtype)
    (folder / "tokenizer_config.json").write_text("{}\n")
    return folder


def load_reference(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """Loads the Hugging Face model of a checkpoint."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def make_config(checkpoint: Path, /, **sections: dict[str, Any]) -> Config:
    """Makes a whole config around one checkpoint, in float32 unless `model` in `sections` says otherwise."""
    settings: dict[str, Any] = {name: dict(section) for name, section in sections.items()}
    settings["model"] = {"path": checkpoint, "dtype": "float32", **settings.get("model", {})}
    settings.setdefault("data", {"train": "unused.jsonl", "max_prompt_tokens": 64})
    settings.setdefault("train", {"mini_batch": 8})
    settings["rollout"] = {"prompts": 4, "responses": 2, "max_response_tokens": 64, **settings.get("rollout", {})}
    settings.setdefault("reward", {"overlong": {"punishment": False}})
    return Config.model_validate(settings)
