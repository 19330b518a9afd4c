"""Pushes into a process of its own that is no engine: by each transport, with nothing but torch installed.

On CPU only gloo runs, so that on a GPU it is the code that is tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch

from dapo_megatron.config import WeightsConfig
from dapo_megatron.errors import EngineError
from dapo_megatron.weights.buckets import describe
from dapo_megatron.weights.checksum import checksums
from dapo_megatron.weights.publish import Publisher, open_publisher
from dapo_megatron.weights.verify import Inventory
from tests.helpers.stand_in import OneEngine, OneRank, StandIn, random_weights

SHAPES = {
    "embed.weight": (3000, 512),  # larger than a bucket
    **{
        f"layers.{layer}.{name}.weight": shape
        for layer in range(3)
        for name, shape in {"norm": (512,), "q": (512, 512), "k": (100, 512), "odd": (7, 3), "up": (1200, 512)}.items()
    },
}
DEVICES = {"gloo": ("cpu", "cpu"), "ipc": ("cuda:0", "cuda:0"), "nccl": ("cuda:0", "cuda:1")}
"""Of the leader and of the engine."""


@pytest.fixture(
    params=["gloo", pytest.param("ipc", marks=pytest.mark.gpu), pytest.param("nccl", marks=pytest.mark.gpu)],
)
def transport(request: pytest.FixtureRequest) -> str:
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL refuses two members on one GPU; torch sees one")
    return request.param


@pytest.fixture
def engine(transport: str) -> Iterator[StandIn]:
    with closing(StandIn(DEVICES[transport][1])) as engine:
        yield engine


@pytest.fixture
def weights(transport: str) -> dict[str, torch.Tensor]:
    return random_weights(SHAPES, DEVICES[transport][0])


@pytest.fixture
def publisher(transport: str, engine: StandIn, weights: dict[str, torch.Tensor]) -> Iterator[Publisher]:
    config = WeightsConfig.model_validate({"transport": transport, "bucket_mib": 2, "push_seconds": 60})
    inventory, ranks = Inventory(**describe(list(weights.items()))), OneRank(DEVICES[transport][0])
    with closing(open_publisher(config, inventory, OneEngine(engine), ranks=ranks, workers=1)) as publisher:
        yield publisher


def test_every_bit_arrives(publisher: Publisher, engine: StandIn, weights: dict[str, torch.Tensor]) -> None:
    def there() -> Any:
        return dict(zip(weights, checksums(list(weights.values())), strict=True))

    assert publisher.push(weights.items(), 1)["push/share"].value == 1
    first = engine.sums()
    assert first == there()
    weights["layers.1.up.weight"][5, 5] += 1
    share = publisher.push(weights.items(), 2)["push/share"].value
    assert engine.sums() == there() != first
    assert 0 < share < 0.5  # one layer of three
    for tensor in weights.values():
        tensor.neg_()
    turned = {name: tensor.T.contiguous().T if tensor.dim() == 2 else tensor for name, tensor in weights.items()}
    assert not turned["layers.0.q.weight"].is_contiguous()
    publisher.push(turned.items(), 3)
    assert engine.sums() == there()


def test_a_process_that_is_gone_ends_the_push(
    publisher: Publisher, engine: StandIn, weights: dict[str, torch.Tensor]
) -> None:
    def killing() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights.items():
            if name == "layers.1.q.weight":
                engine.close()
            yield name, tensor

    with pytest.raises((EngineError, EOFError, OSError)):
        publisher.push(killing(), 1)
