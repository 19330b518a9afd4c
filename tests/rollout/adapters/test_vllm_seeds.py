"""A real vLLM server on CPU: with a seed, a response is the same bit for bit, whatever goes on beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from dapo_megatron.config_file import parse
from dapo_megatron.rollout.engine import Sampling, request_seed
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.types import Completion, Prompt
from tests.helpers.checkpoint import TINY

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPTS = [Prompt(f"p{i}", tuple(3 + (13 * i + 7 * j) % 250 for j in range(100 + 2 * i)), "", "") for i in range(64)]
N = 8
SEEDS = partial(request_seed, 0, 0)
HOW = Sampling(temperature=1.0, top_p=1.0, max_tokens=48, stop_token_ids=tuple(range(0, 264, 20)))

Answers = dict[int, list[Completion]]


@pytest.fixture(scope="module")
def wide_values(tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model with sums over more than 1,024 products, which oneDNN divides in more than one way."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "hidden_size": 128, "intermediate_size": 1536, "num_hidden_layers": 2}
    special = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = Qwen2Config(**{**TINY, **sizes, **special, "tie_word_embeddings": False, "initializer_range": 0.1})
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    data = {"train": "unused.jsonl", "max_prompt_tokens": 256}
    return {**tiny_values, "model": {"path": str(folder), "dtype": "float32"}, "data": data}


def start(values: dict[str, Any], folder: Path, **engine: Any) -> Engines:
    engines = Engines(parse({**values, "engine": {"startup_seconds": 120, **engine}}), folder, ranks=0)
    engines.wait_ready()
    return engines


def ask(engines: Engines, places: Sequence[int], *, together: bool = True, n: int = N) -> Answers:
    async def one(place: int) -> tuple[int, list[Completion]]:
        seeded = replace(HOW, seed=SEEDS(place, PROMPTS[place].uid))
        return place, await engines.generate(PROMPTS[place], seeded, n)

    async def work() -> Answers:
        if together:
            return dict(await asyncio.gather(*map(one, places)))
        return dict([await one(place) for place in places])

    return engines.run(work())


def differing(some: Answers, all_: Answers) -> dict[str, int]:
    """How many responses are not the same in `all_`, tokens and log-probs, of which `some` has a part."""
    pairs = [(a, b) for place, group in some.items() for a, b in zip(group, all_[place], strict=False)]
    return {
        name: sum(not np.array_equal(getattr(a, name), getattr(b, name)) for a, b in pairs)
        for name in ("token_ids", "logprobs", "finish")
    }


SAME = {"token_ids": 0, "logprobs": 0, "finish": 0}
ALL = range(len(PROMPTS))


@pytest.fixture(scope="module")
def engines(wide_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    with closing(start(wide_values, tmp_path_factory.mktemp("run"))) as engines:
        yield engines


@pytest.fixture(scope="module")
def answers(engines: Engines) -> Answers:
    """512 responses at once, to prompts of more than 8,192 tokens together."""
    answers = ask(engines, ALL)
    long = [c.token_ids.tobytes() for group in answers.values() for c in group if c.length > 8]
    assert len(long) == len(set(long)) > 200, "two responses have the same stream"
    return answers


def test_in_another_order(engines: Engines, answers: Answers) -> None:
    assert differing(ask(engines, ALL[::-1]), answers) == SAME


def test_in_halves(engines: Engines, answers: Answers) -> None:
    assert differing(ask(engines, ALL[::2]) | ask(engines, ALL[1::2]), answers) == SAME


def test_one_prompt_and_one_response_at_a_time(engines: Engines, answers: Answers) -> None:
    assert differing(ask(engines, ALL[::8], together=False), answers) == SAME
    assert differing(ask(engines, ALL[1::8], together=False, n=1), answers) == SAME


@pytest.mark.long
def test_on_two_engines_that_were_just_started_with_other_threads(
    answers: Answers, wide_values: dict[str, Any], tmp_path: Path
) -> None:
    with closing(start(wide_values, tmp_path, count=2)) as two:
        assert differing(ask(two, ALL), answers) == SAME


def test_sequences_that_were_put_off_and_read_again(
    answers: Answers, wide_values: dict[str, Any], tmp_path: Path
) -> None:
    """With a cache of 40 blocks of 128 tokens, an engine gives up sequences that it has begun, and begins them anew."""
    few = ["--num-gpu-blocks-override", "40"]
    with closing(start(wide_values, tmp_path, extra_args=few)) as engines:
        assert differing(ask(engines, ALL), answers) == SAME
