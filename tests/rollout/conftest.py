"""A tiny Qwen2 checkpoint, and a config around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tests.helpers.checkpoint import TINY

END = 2
"""Token that ends a response of the tiny model."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Qwen2 with half a million random parameters, 256 byte tokens and float32 weights."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<unk>", "<end>", *sorted(alphabet)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    special = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": 0}
    config = Qwen2Config(**{**TINY, **sizes, **special, "tie_word_embeddings": False, "initializer_range": 0.1})
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_values(tiny_model: Path) -> dict[str, Any]:
    """A config of the tiny model as plain values, for `config_file.parse`."""
    return {
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "data": {"train": "unused.jsonl", "max_prompt_tokens": 128},
        "rollout": {"prompts": 4, "responses": 4, "max_response_tokens": 64},
        "train": {"mini_batch": 16, "micro_batch_tokens": 1024},
        "reward": {"overlong": {"cache": 16}},
        "engine": {"startup_seconds": 120},
    }
