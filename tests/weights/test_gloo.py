"""Two real vLLM servers on CPU that receive changed weights over gloo."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import psutil
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from dapo_megatron.config_file import parse
from dapo_megatron.errors import EngineError
from dapo_megatron.rollout.engine import Sampling
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.types import Completion, Prompt, VersionSpan
from dapo_megatron.weights.broadcast import BroadcastPublisher
from dapo_megatron.weights.buckets import describe
from dapo_megatron.weights.verify import Inventory
from tests.helpers.checkpoint import TINY

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=32, stop_token_ids=())
# Longer than a cache block (128 tokens on CPU), so that the prefix cache has something to keep.
PROMPT = Prompt("p", tuple(3 + 7 * i % 60 for i in range(300)), "", "")
BUCKET_BYTES = 40_000
"""Less than the largest tensor, more than the smallest."""


def make_model(seed: int, tied: bool) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 80, "hidden_size": 128, "intermediate_size": 160}
    config = Qwen2Config(**{**TINY, **sizes, "tie_word_embeddings": tied, "initializer_range": 0.1})
    return Qwen2ForCausalLM(config).float().eval()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def first(tied: bool) -> Any:
    return make_model(0, tied)


@pytest.fixture(scope="module")
def second(tied: bool) -> Any:
    return make_model(1, tied)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """As the actor exports them: a tied model has no output layer of its own."""
    tied = model.config.tie_word_embeddings
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}


@pytest.fixture(scope="module")
def engines(first: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("model")
    first.save_pretrained(folder)
    values = {
        "model": {"path": str(folder), "dtype": "float32"},
        "data": {"train": "unused.jsonl", "max_prompt_tokens": 400},
        "rollout": {"prompts": 4, "responses": 4, "max_response_tokens": 64},
        "train": {"mini_batch": 16, "micro_batch_tokens": 1024},
        "reward": {"overlong": {"punishment": False}},
        "engine": {"count": 2, "startup_seconds": 120},
    }
    with closing(Engines(parse(values), tmp_path_factory.mktemp("run"), ranks=0)) as engines:
        engines.wait_ready()
        yield engines


@pytest.fixture(scope="module")
def publisher(engines: Engines, first: Any) -> Iterator[BroadcastPublisher]:
    inventory = Inventory(**describe(list(weights_of(first).items())))
    publisher = BroadcastPublisher(inventory, engines, BUCKET_BYTES, timeout_seconds=30)
    yield publisher
    publisher.close()


def generate(engines: Engines) -> list[list[Completion]]:
    """Responses of each engine."""

    async def everywhere() -> list[list[Completion]]:
        return await asyncio.gather(*(engine.generate(PROMPT, SAMPLING, 4) for engine in engines))

    return engines.run(everywhere())


@torch.no_grad()
def worst_error(model: Any, answers: list[list[Completion]]) -> float:
    errors: list[torch.Tensor] = []
    for completion in (completion for completions in answers for completion in completions):
        logits = model(torch.tensor([[*PROMPT.token_ids, *completion.token_ids.tolist()]])).logits[
            0, len(PROMPT.token_ids) - 1 : -1
        ]
        tokens = torch.from_numpy(completion.token_ids).long()
        expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        errors.append((expected - torch.tensor(completion.logprobs)).abs().max())
    return float(torch.stack(errors).max())  # NaN where any is


def test_log_probs_follow_the_weights(engines: Engines, publisher: BroadcastPublisher, first: Any, second: Any) -> None:
    before = generate(engines)
    assert worst_error(first, before) <= 2e-5
    assert before[0][0].versions == (VersionSpan(0, 0, 32),)

    publisher.push(weights_of(second).items(), version=1)
    # The prompt is the same, so its keys and values were cached under the old weights.
    after = generate(engines)
    assert worst_error(second, after) <= 2e-5
    assert worst_error(first, after) > 0.1
    assert {completion.versions for completions in after for completion in completions} == {(VersionSpan(1, 0, 32),)}


def test_strided_tensors_arrive_whole(engines: Engines, publisher: BroadcastPublisher, first: Any) -> None:
    weights = {
        name: tensor.T.contiguous().T if tensor.dim() == 2 else tensor for name, tensor in weights_of(first).items()
    }
    assert not all(tensor.is_contiguous() for tensor in weights.values())
    publisher.push(weights.items(), version=2)
    after = generate(engines)
    assert worst_error(first, after) <= 2e-5
    assert after[1][0].versions[0].version == 2


def test_a_killed_engine_ends_the_push(engines: Engines, publisher: BroadcastPublisher, first: Any) -> None:
    """Last, because it ends an engine of this module."""
    guards = [p for p in psutil.Process().children() if "dapo_megatron.rollout.guard" in p.cmdline()]
    family = guards[1].children(recursive=True)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for index, (name, tensor) in enumerate(weights_of(first).items()):
            if index == 5:
                for process in family:
                    process.kill()
            yield name, tensor

    started = time.monotonic()
    with pytest.raises(EngineError, match="engine 1"):
        publisher.push(weights(), version=1)
    assert time.monotonic() - started < 10.0
