"""The actor's weights in a real vLLM server on CPU: what either says of the same tokens, for families besides Qwen2."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_megatron.config_file import parse
from dapo_megatron.pack.microbatch import build
from dapo_megatron.rollout.engine import Sampling
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.types import Completion, MiniBatch, Prompt, TrainSample
from dapo_megatron.weights.broadcast import BroadcastPublisher
from tests.helpers.models import save_tiny

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=32, stop_token_ids=())
PROMPT = Prompt("p", tuple(3 + 7 * i % 60 for i in range(300)), "", "")
SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"tied": True, "head_dim": 64},
    "llama3": {"tied": False},
    "qwen3_moe": {"tied": False, "head_dim": 64, "moe_intermediate_size": 64},
}
"""Heads of 64 and 32 channels, which vLLM has kernels for."""


@pytest.fixture(params=["qwen3_moe", *(pytest.param(name, marks=pytest.mark.long) for name in ("qwen3", "llama3"))])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family: dict[str, Any] = SIZES[request.param]
    return save_tiny(tmp_path / "model", request.param, **family, hidden=128, vocab_size=80, intermediate_size=160)


@pytest.fixture
def engines(model: Path, tmp_path: Path) -> Iterator[Engines]:
    values = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": "unused.jsonl", "max_prompt_tokens": 400},
        "rollout": {"prompts": 4, "responses": 4, "max_response_tokens": 64},
        "train": {"mini_batch": 16, "micro_batch_tokens": 1024},
        "reward": {"overlong": {"punishment": False}},
        "engine": {"startup_seconds": 300},
    }
    with closing(Engines(parse(values), tmp_path / "run", ranks=0)) as engines:
        engines.wait_ready()
        yield engines


def sample(completion: Completion) -> TrainSample:
    tokens = [*PROMPT.token_ids, *completion.token_ids.tolist()]
    start = len(PROMPT.token_ids)
    return TrainSample(
        token_ids=torch.tensor(tokens, dtype=torch.int32),
        loss_mask=torch.arange(len(tokens)) >= start,
        rollout_logprobs=torch.tensor([0.0] * start + completion.logprobs.tolist()),
        advantage=1.0,
        group=0,
    )


def worst_difference(engines: Engines, actor: Any) -> float:
    """Of log-probs, between the engine that sampled tokens and the actor."""

    async def everywhere() -> list[list[Completion]]:
        return await asyncio.gather(*(engine.generate(PROMPT, SAMPLING, 4) for engine in engines))

    (completions,) = engines.run(everywhere())
    batch = build([sample(completion) for completion in completions], sequence_multiple=1, total_multiple=1)
    (mini_batch,), _ = actor.with_old_logprobs([MiniBatch((batch,), batch.loss_tokens)])
    (scored,) = mini_batch.micro_batches
    return float((scored.old_logprobs_T - scored.rollout_logprobs_T)[scored.loss_mask_T].abs().max())


def test_engine_and_trainer_agree_before_and_after_a_push(alone: Any, model: Path, engines: Engines) -> None:
    from tests.actor.test_actor import build as build_actor

    actor, checkpoint = build_actor(model, alone)
    assert worst_difference(engines, actor) <= 2e-5
    with torch.no_grad():
        for param in actor.chunks[0].parameters():
            param.add_(0.05 * torch.randn(param.shape, generator=torch.Generator().manual_seed(3)))
    assert worst_difference(engines, actor) > 0.1
    with closing(BroadcastPublisher(checkpoint.inventory, engines, 40_000, timeout_seconds=30)) as publisher:
        publisher.push(checkpoint.export(actor.chunks), version=1)
        assert worst_difference(engines, actor) <= 2e-5
