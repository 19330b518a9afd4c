"""A real SGLang server on CPU that receives changed weights over gloo, of a tied model. Of one that is not:
`tests/test_canary_sglang.py`.
"""

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
from dapo_megatron.types import Completion, Prompt
from dapo_megatron.weights.broadcast import BroadcastPublisher
from dapo_megatron.weights.buckets import describe
from dapo_megatron.weights.verify import Inventory
from tests.helpers.checkpoint import TINY
from tests.helpers.sglang import NOTICED_SECONDS, STARTUP_SECONDS, needs_sglang

pytestmark = [*needs_sglang, pytest.mark.timeout(STARTUP_SECONDS + 300)]

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=32, stop_token_ids=())
PROMPT = Prompt("p", tuple(3 + 7 * i % 60 for i in range(300)), "", "")
BUCKET_BYTES = 40_000
"""Less than the largest tensor, more than the smallest."""


def make_model(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 80, "hidden_size": 128, "intermediate_size": 160}
    config = Qwen2Config(**{**TINY, **sizes, "tie_word_embeddings": True, "initializer_range": 0.1})
    return Qwen2ForCausalLM(config).float().eval()


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return [make_model(seed) for seed in range(4)]


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """As the actor exports them: a tied model has no output layer of its own."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


@pytest.fixture(scope="module")
def engines(models: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("model")
    models[0].save_pretrained(folder)
    values = {
        "model": {"path": str(folder), "dtype": "float32"},
        "data": {"train": "unused.jsonl", "max_prompt_tokens": 400},
        "rollout": {"prompts": 4, "responses": 4, "max_response_tokens": 64},
        "train": {"mini_batch": 16, "micro_batch_tokens": 1024},
        "reward": {"overlong": {"punishment": False}},
        "engine": {"kind": "sglang", "startup_seconds": STARTUP_SECONDS},
        "weights": {"push_seconds": 60},
    }
    with closing(Engines(parse(values), tmp_path_factory.mktemp("run"), ranks=0)) as engines:
        engines.wait_ready()
        yield engines


@pytest.fixture(scope="module")
def publisher(engines: Engines, models: list[Any]) -> Iterator[BroadcastPublisher]:
    inventory = Inventory(**describe(list(weights_of(models[0]).items())))
    publisher = BroadcastPublisher(inventory, engines, BUCKET_BYTES, timeout_seconds=60)
    yield publisher
    publisher.close()


def generate(engines: Engines) -> list[Completion]:
    return engines.run(engines.generate(PROMPT, SAMPLING, 4))


@torch.no_grad()
def errors(model: Any, completion: Completion) -> torch.Tensor:
    """|difference| of log-probs from those of a model, in nats, for each token."""
    tokens = torch.from_numpy(completion.token_ids).long()
    logits = model(torch.cat([torch.tensor(PROMPT.token_ids), tokens])[None]).logits[0, len(PROMPT.token_ids) - 1 :]
    expected = logits[:-1].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return (expected - torch.tensor(completion.logprobs)).abs()


def worst_error(model: Any, completions: list[Completion]) -> float:
    return float(torch.cat([errors(model, completion) for completion in completions]).max())


def versions(completions: list[Completion]) -> set[tuple[tuple[int, int, int], ...]]:
    return {tuple((span.version, span.start, span.end) for span in c.versions) for c in completions}


def test_log_probs_follow_the_weights_in_three_pushes(
    engines: Engines, publisher: BroadcastPublisher, models: list[Any]
) -> None:
    before = generate(engines)
    assert worst_error(models[0], before) <= 2e-5
    assert versions(before) == {((0, 0, 32),)}
    for version in (1, 2, 3):
        publisher.push(weights_of(models[version]).items(), version=version)
        after = generate(engines)
        assert worst_error(models[version], after) <= 2e-5
        assert worst_error(models[version - 1], after) > 0.1
        assert versions(after) == {((version, 0, 32),)}


def test_strided_tensors_arrive_whole(engines: Engines, publisher: BroadcastPublisher, models: list[Any]) -> None:
    weights = {
        name: tensor.T.contiguous().T if tensor.dim() == 2 else tensor for name, tensor in weights_of(models[0]).items()
    }
    assert not all(tensor.is_contiguous() for tensor in weights.values())
    publisher.push(weights.items(), version=4)
    assert worst_error(models[0], generate(engines)) <= 2e-5


def test_responses_that_a_push_comes_between_say_so(
    engines: Engines, publisher: BroadcastPublisher, models: list[Any]
) -> None:
    """They are put off and go on under the new weights, and each span has the log-probs of those that it names."""
    (engine,) = engines

    async def begin() -> list[asyncio.Task[list[Completion]]]:
        long = Sampling(temperature=1.0, top_p=1.0, max_tokens=64, stop_token_ids=())
        task = asyncio.create_task(engine.generate(PROMPT, long, 4))
        while (await engine.progress()).tokens < 40:
            await asyncio.sleep(0.005)
        return [task]

    async def end(task: asyncio.Task[list[Completion]]) -> list[Completion]:
        return await task

    (task,) = engines.run(begin())
    publisher.push(weights_of(models[1]).items(), version=5)
    for completion in engines.run(end(task)):
        (before, _, cut), (after, start, stop) = ((span.version, span.start, span.end) for span in completion.versions)
        assert (before, after, stop) == (4, 5, 64) and 0 < cut == start < 64
        assert errors(models[0], completion)[:cut].max() <= 2e-5
        assert errors(models[1], completion)[cut:].max() <= 2e-5


def test_what_was_not_announced_is_refused(engines: Engines, publisher: BroadcastPublisher, models: list[Any]) -> None:
    """A bucket outside of a transfer is an error at once, and not a sender that waits for nobody."""
    (engine,) = engines
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"engine 0.*must run between begin_weight_update"):
        engines.run(engine.receive({"tensors": [0], "checksums": None}))
    assert time.monotonic() - started < 10.0
    assert worst_error(models[1], generate(engines)) <= 2e-5


def test_a_killed_engine_ends_the_push(engines: Engines, publisher: BroadcastPublisher, models: list[Any]) -> None:
    """Its server; the other processes end with it. Last, because it ends the engine of this module."""
    (guard,) = [p for p in psutil.Process().children() if "dapo_megatron.rollout.guard" in p.cmdline()]
    (server,) = guard.children()
    killed = 0.0

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for index, (name, tensor) in enumerate(weights_of(models[0]).items()):
            if index == 5:
                nonlocal killed
                server.kill()
                killed = time.monotonic()
            yield name, tensor

    with pytest.raises(EngineError, match="engine 0"):
        publisher.push(weights(), version=8)
    assert 0 < time.monotonic() - killed < NOTICED_SECONDS
