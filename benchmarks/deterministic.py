"""What reproducible responses cost a vLLM engine on CPU, and what differs without them.

    python -m benchmarks.deterministic [--parameters 15] [--prompt 64] [--length 64] [--rounds 3]

The same 512 requests, 32 prompts x 16 responses of one length, go to two engines in turn: one as the adapter starts it,
and one in which attention may cut sums over a sequence into parts (vLLM's default), with and without seeds. Then each
engine answers half of the prompts at a time, and the responses are compared bit by bit.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from dapo_megatron.config_file import parse
from dapo_megatron.rollout.adapters import vllm
from dapo_megatron.rollout.engine import Sampling, request_seed
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.rollout.place import Place
from dapo_megatron.types import Completion, Prompt

PROMPTS, RESPONSES = 32, 16
SHAPES: dict[int, dict[str, Any]] = {
    1: {"vocab_size": 264, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4},
    15: {"vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8},
}
"""Millions of parameters -> a Qwen2 of about that size."""

Answers = dict[int, list[Completion]]


class Split(vllm.Adapter):
    """vLLM's own way of attending."""

    def environment(self, place: Place) -> dict[str, str]:
        return super().environment(place) | {"VLLM_CPU_ATTN_SPLIT_KV": "1"}


def save_model(folder: Path, parameters: int) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": SHAPES[parameters]["hidden_size"] // 64, "num_key_value_heads": 2}
    config = Qwen2Config(**SHAPES[parameters], **heads, initializer_range=0.05, tie_word_embeddings=False)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def start(kind: str, folder: Path, arguments: argparse.Namespace) -> Engines:
    values = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"train": "unused.jsonl", "max_prompt_tokens": arguments.prompt},
        "rollout": {"prompts": PROMPTS, "responses": RESPONSES, "max_response_tokens": arguments.length},
        "train": {"mini_batch": PROMPTS * RESPONSES, "micro_batch_tokens": 1 << 20},
        "reward": {"overlong": {"punishment": False}},
        "engine": {"kind": kind},
    }
    (folder / kind).mkdir()
    engines = Engines(parse(values), folder / kind, ranks=0)
    engines.wait_ready()
    return engines


def ask(engines: Engines, prompts: list[Prompt], how: Sampling, places: range, *, seeded: bool = True) -> Answers:
    seeds = partial(request_seed, 0, 0)

    async def one(place: int) -> tuple[int, list[Completion]]:
        prompt = prompts[place]
        sampling = replace(how, seed=seeds(place, prompt.uid) if seeded else None)
        return place, await engines.generate(prompt, sampling, RESPONSES)

    async def work() -> Answers:
        return dict(await asyncio.gather(*map(one, places)))

    return engines.run(work())


def differing(some: Answers, others: Answers) -> str:
    pairs = [(a, b) for place in some for a, b in zip(some[place], others[place], strict=True)]
    tokens = sum(not np.array_equal(a.token_ids, b.token_ids) for a, b in pairs)
    logprobs = sum(not np.array_equal(a.logprobs, b.logprobs) for a, b in pairs)
    return f"of {len(pairs)} responses, {tokens} differ in tokens, {logprobs} in log-probs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, choices=SHAPES, default=1, help="millions")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--length", type=int, default=64, help="tokens of a response")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    vocabulary = SHAPES[arguments.parameters]["vocab_size"]
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(f"p{place}", tuple(rng.integers(3, vocabulary, arguments.prompt).tolist()), "", "")
        for place in range(PROMPTS)
    ]
    how = Sampling(temperature=1.0, top_p=1.0, max_tokens=arguments.length, stop_token_ids=())
    whole, halves = range(PROMPTS), (range(PROMPTS // 2), range(PROMPTS // 2, PROMPTS))
    with tempfile.TemporaryDirectory(prefix="dapo-megatron-deterministic-") as name, ExitStack() as stack:
        folder = Path(name)
        save_model(folder / "model", arguments.parameters)
        split, ours = (
            stack.enter_context(closing(start(kind, folder, arguments)))
            for kind in ("benchmarks.deterministic:Split", "vllm")
        )
        ways = {"split, no seeds": (split, False), "split, seeds": (split, True), "as it is": (ours, True)}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(1 + arguments.rounds):
            for way, (engines, seeded) in ways.items():
                started = time.monotonic()
                ask(engines, prompts, how, whole, seeded=seeded)
                seconds[way].append(time.monotonic() - started)
        base = median(seconds["split, no seeds"][1:])
        for way, taken in seconds.items():
            print(f"{way:>16}: {median(taken[1:]):.2f} s, {median(taken[1:]) / base:.2f} of the time without any of it")
        for way, engines in {"split, seeds": split, "as it is": ours}.items():
            once = ask(engines, prompts, how, whole)
            parts = ask(engines, prompts, how, halves[0]) | ask(engines, prompts, how, halves[1])
            print(f"{way:>16}: at once and in halves, {differing(once, parts)}")


if __name__ == "__main__":
    main()
