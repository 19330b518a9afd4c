"""A real vLLM server on CPU that gets changed weights three times, by each transport."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_megatron.config_file import parse
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.types import Completion, VersionSpan
from dapo_megatron.weights.buckets import describe
from dapo_megatron.weights.publish import Publisher, open_publisher
from dapo_megatron.weights.verify import Inventory
from tests.weights.test_gloo import PROMPT, SAMPLING, make_model, weights_of, worst_error

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(params=[pytest.param("gloo", marks=pytest.mark.long), "disk"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    make_model(0, tied=False).save_pretrained(tmp_path / "model")
    values = {
        "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
        "data": {"train": "unused.jsonl", "max_prompt_tokens": 400},
        "rollout": {"prompts": 4, "responses": 4, "max_response_tokens": 64},
        "train": {"mini_batch": 16, "micro_batch_tokens": 1024},
        "reward": {"overlong": {"punishment": False}},
        "engine": {"startup_seconds": 1000},
        "weights": {"transport": request.param, "folder": str(tmp_path / "shared"), "push_seconds": 120},
    }
    return parse(values)


@pytest.fixture
def engines(config: Any, tmp_path: Path) -> Iterator[Engines]:
    with closing(Engines(config, tmp_path / "run", ranks=0)) as engines:
        engines.wait_ready()
        yield engines


@pytest.fixture
def publisher(config: Any, engines: Engines) -> Iterator[Publisher]:
    inventory = Inventory(**describe(list(weights_of(make_model(0, tied=False)).items())))
    with closing(open_publisher(config.weights, inventory, engines, folder=config.weights_folder)) as publisher:
        yield publisher


def generate(engines: Engines) -> list[list[Completion]]:
    async def everywhere() -> list[list[Completion]]:
        return await asyncio.gather(*(engine.generate(PROMPT, SAMPLING, 4) for engine in engines))

    return engines.run(everywhere())


@torch.no_grad()
def change_a_layer(model: Any) -> None:
    for parameter in model.model.layers[1].mlp.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))


def test_log_probs_follow_the_weights(config: Any, engines: Engines, publisher: Publisher) -> None:
    whole = config.weights.transport == "disk"  # everything each time
    shares: list[float] = []
    model = make_model(1, tied=False)

    def push(version: int) -> None:
        measures = publisher.push(weights_of(model).items(), version=version)
        shares.append(measures["push/share"].value)
        after = generate(engines)
        assert worst_error(model, after) <= 2e-5
        assert after[0][0].versions == (VersionSpan(version, 0, 32),)

    push(1)
    push(2)  # unchanged
    before = generate(engines)
    change_a_layer(model)
    push(3)
    assert worst_error(model, before) > 0.1
    model = make_model(2, tied=False)
    push(4)
    assert shares[0] == 1 and shares[1] == float(whole)
    assert (shares[2] == 1) == whole and shares[2] > 0
    assert shares[3] > 0.99  # a norm is what it was
    if whole:
        assert [path.name for path in config.weights_folder.iterdir()] == ["version-4"]
