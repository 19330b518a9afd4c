"""The second problem of `against_trl`: a random Qwen2 of 15M parameters over 160 tokens, and random prompts.

It ends a response with probability 1/160 at each token, so lengths are geometric, and ragged up to the cap.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

END = "<|endoftext|>"
CHARACTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]
PAIRS = [first + second for first in "abcdefgh" for second in CHARACTERS][: 159 - len(CHARACTERS)]
PROMPTS, PROMPT_TOKENS = 512, 24


def make(folder: Path) -> None:
    """Write base/ and train.jsonl to `folder`."""
    torch.manual_seed(0)
    vocabulary = [END, *CHARACTERS, *PAIRS]
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=384,
        intermediate_size=1_280,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1_024,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "base")
    tokenizer = Qwen2Tokenizer({token: index for index, token in enumerate(vocabulary)}, [])
    tokenizer.save_pretrained(folder / "base")
    rng = random.Random(0)
    rows = ({"prompt": "".join(rng.choices(CHARACTERS, k=PROMPT_TOKENS)), "answer": "1"} for _ in range(PROMPTS))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
