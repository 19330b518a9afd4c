"""A Hugging Face checkpoint that is whole for every check before a run, made without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CHARACTERS = "0123456789+= "
END = "<end>"
TINY: dict[str, Any] = {
    "vocab_size": 50,  # no multiple of 16, so that Megatron pads it
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
"""Settings of a Qwen2."""


def write_checkpoint(folder: Path, *, end_token: bool = True, **changes: Any) -> Path:
    """Writes config.json of a tiny Qwen2 with `changes`, weights, and a tokenizer of one token per character."""
    folder.mkdir(parents=True)
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **TINY}
    # What is served on CPU has heads for which vLLM has kernels there.
    config |= {"head_dim": 32, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    save_file({"model.embed_tokens.weight": np.zeros((50, 32), np.float32)}, folder / "model.safetensors")
    write_tokenizer(folder, end_token=end_token)
    return folder


def write_tokenizer(folder: Path, *, end_token: bool) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate([END, *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    core.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END if end_token else None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_prompts(path: Path, *prompts: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "3"}) + "\n" for prompt in prompts))
    return path


def values(folder: Path) -> dict[str, Any]:
    """Makes a configuration of a run in `folder` that passes every check, with its checkpoint and prompts."""
    return {
        "model": {"path": str(write_checkpoint(folder / "model")), "dtype": "float32"},
        "data": {"train": str(write_prompts(folder / "train.jsonl", "1+2=", "2+2=")), "max_prompt_tokens": 8},
        "rollout": {"prompts": 2, "responses": 2, "max_response_tokens": 16},
        "reward": {"overlong": {"cache": 4}},
        "train": {"mini_batch": 4, "micro_batch_tokens": 64, "steps": 1},
        "eval": {"data": str(write_prompts(folder / "heldout.jsonl", "1+1="))},
        "run": {"dir": str(folder / "runs"), "name": "test", "tensorboard": False},
    }
