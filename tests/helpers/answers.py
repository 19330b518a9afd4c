"""A checkpoint whose model answers 0 or 1 at random, in the words that rewards look for, whatever it is asked.

Its tokenizer has a token for each byte and a ChatML template, so that any recipe's prompts fit it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ANSWERS = ("Answer: 0\n", "Answer: 1\n", r"\boxed{0}" + "\n", r"\boxed{1}" + "\n")
"""Tokens of their own."""
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRENGTH = {END: 8.2, TURN_END: 7.0, **dict.fromkeys(ANSWERS, 8.0)}
"""Logits; those of other tokens are near 0. The likeliest token ends a response, so that one ends at any top-p."""


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    core.add_special_tokens([END, TURN, TURN_END])
    core.add_tokens([AddedToken(answer, normalized=False) for answer in ANSWERS])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, chat_template=CHATML)


def stop_tokens() -> str:
    """The override that has responses end where the recipes' models have them end."""
    ends = tokenizer().convert_tokens_to_ids([END, TURN_END])
    return f"rollout.stop_token_ids={ends}"


def save_answering(folder: Path, layers: int = 2) -> Path:
    """Saves an untied Qwen2 whose hidden states all point the same way, and an output layer that looks there."""
    words = tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=272,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=words.convert_tokens_to_ids(END),
    )
    model = Qwen2ForCausalLM(config)
    way = torch.nn.functional.normalize(torch.randn(config.hidden_size), dim=0)
    with torch.no_grad():
        model.model.embed_tokens.weight += 3 * way
        for token, logit in STRENGTH.items():
            # The last norm leaves the root of hidden_size of a hidden state.
            model.lm_head.weight[words.convert_tokens_to_ids(token)] += logit / config.hidden_size**0.5 * way
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_problems(path: Path, answers: Iterable[int]) -> Path:
    """Writes a problem for each answer, as prepared data sets have them."""
    rows = [{"prompt": f"What is {answer} + {n} - {n}?", "answer": str(answer)} for n, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
