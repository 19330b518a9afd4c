"""A real vLLM server that gets changed weights: on CPU three times, by each transport; on a GPU, and back again."""

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
from tests.helpers.stand_in import OneRank
from tests.weights.test_gloo import PROMPT, SAMPLING, make_model, weights_of, worst_error

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]


ON_GPUS = {"ipc": (0, "colocated"), "nccl": (1, "split")}
"""Transport -> ranks of whose GPUs an engine keeps away, and its placement."""


@pytest.fixture
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    on_gpus = request.param in ON_GPUS
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL refuses two members on one GPU; torch sees one")
    model = make_model(0, tied=False)
    (model.bfloat16() if on_gpus else model).save_pretrained(tmp_path / "model")
    values = {
        "model": {"path": str(tmp_path / "model"), "dtype": "bfloat16" if on_gpus else "float32"},
        "data": {"train": "unused.jsonl", "max_prompt_tokens": 400},
        "rollout": {"prompts": 4, "responses": 4, "max_response_tokens": 64},
        "train": {"mini_batch": 16, "micro_batch_tokens": 1024},
        "reward": {"overlong": {"punishment": False}},
        "engine": {"startup_seconds": 1000, "placement": ON_GPUS[request.param][1] if on_gpus else "split"},
        "weights": {"transport": request.param, "folder": str(tmp_path / "shared"), "push_seconds": 120},
    }
    return parse(values)


@pytest.fixture
def engines(config: Any, tmp_path: Path) -> Iterator[Engines]:
    ranks, _ = ON_GPUS.get(config.weights.transport, (0, ""))
    with closing(Engines(config, tmp_path / "run", ranks=ranks)) as engines:
        engines.wait_ready()
        yield engines


@pytest.fixture
def publisher(config: Any, engines: Engines) -> Iterator[Publisher]:
    on_gpus = config.weights.transport in ON_GPUS
    model = make_model(0, tied=False)
    inventory = Inventory(**describe(list(weights_of(model.bfloat16() if on_gpus else model).items())))
    ranks = OneRank("cuda:0") if on_gpus else None
    with closing(
        open_publisher(config.weights, inventory, engines, ranks=ranks, workers=1, folder=config.weights_folder)
    ) as publisher:
        yield publisher


def generate(engines: Engines) -> list[list[Completion]]:
    async def everywhere() -> list[list[Completion]]:
        return await asyncio.gather(*(engine.generate(PROMPT, SAMPLING, 4) for engine in engines))

    return engines.run(everywhere())


@torch.no_grad()
def change_a_layer(model: Any) -> None:
    for parameter in model.model.layers[1].mlp.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("config", [pytest.param("gloo", marks=pytest.mark.long), "disk"], indirect=True)
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


@pytest.mark.gpu
@pytest.mark.parametrize("config", ["ipc", "nccl"], indirect=True)
def test_a_push_between_gpus_changes_every_bit_and_back(engines: Engines, publisher: Publisher) -> None:
    """By the engine's own answers: those from its checkpoint come again bit for bit once that has been pushed."""

    def answers() -> list[list[float]]:
        return [completion.logprobs.tolist() for completion in generate(engines)[0]]

    first, second = (
        {name: tensor.bfloat16().cuda() for name, tensor in weights_of(make_model(seed, tied=False)).items()}
        for seed in (0, 1)
    )
    before = answers()
    publisher.push(second.items(), version=1)
    assert answers() != before
    publisher.push(first.items(), version=2)
    assert answers() == before
    publisher.push(first.items(), version=3)  # nothing travels
    assert answers() == before
