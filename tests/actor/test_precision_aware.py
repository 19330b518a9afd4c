"""Megatron's precision-aware optimizer against its plain one: the same updates with less memory."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dapo_megatron.types import MiniBatch
from tests.helpers.batches import make_micro_batch, make_mini_batch, ratio_loss
from tests.helpers.distributed import run_distributed
from tests.helpers.models import make_config, save_qwen2

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "dp2-param-overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "tp2-sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
}
# The gradient is clipped, and eps is large enough that the step depends on its size.
OPTIMIZER = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "clip_grad": 0.2, "betas": [0.9, 0.95]}
EXACT = {"precision_aware": True}
SMALL = {**EXACT, "exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"}


class Trained(NamedTuple):
    measures: list[dict[str, float]]
    """Of each update: the norms."""
    weights: dict[str, Tensor]
    state: set[tuple[str, torch.dtype]]
    state_bytes: int
    """Of this rank, without what lies in the model's memory."""
    stepped: int
    """Numbers that this rank steps."""


def build(
    model_path: Path, topo: Any, parallel: dict[str, Any], optimizer: dict[str, Any], **more: Any
) -> tuple[Any, Any]:
    from dapo_megatron.actor.actor import Actor
    from dapo_megatron.weights.hf import HfCheckpoint
    from tests.helpers.precise_adam import precise_adam

    sections: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "optimizer": OPTIMIZER | optimizer, **more}
    checkpoint = HfCheckpoint(model_path)
    real = torch.cuda.is_available() or not optimizer
    with nullcontext() if real else precise_adam():
        return Actor(make_config(model_path, parallel=parallel, **sections), topo, checkpoint), checkpoint


def mini_batch(topo: Any) -> MiniBatch:
    batches = [make_micro_batch(lengths, seed=len(lengths), multiple=4) for lengths in ([12, 28, 5], [9, 21])]
    share = len(batches) // topo.dp
    mine = batches[topo.dp_rank * share : (topo.dp_rank + 1) * share]
    return make_mini_batch(mine, sum(batch.loss_tokens for batch in batches))


def train(actor: Any, checkpoint: Any, topo: Any) -> Trained:
    from dapo_megatron.actor.optimizer import optimizer_state

    (update,), _ = actor.with_old_logprobs([mini_batch(topo)])
    results = [actor.update(update, ratio_loss, lr=lr) for lr in (1e-2, 5e-3)]
    weights = {name: tensor.clone() for name, tensor in checkpoint.export(actor.chunks)}
    parts = [part.optimizer for part in actor.optimizer.chained_optimizers]
    kept = list(optimizer_state(actor.optimizer, besides=[param for x in actor.chunks for param in x.parameters()]))
    return Trained(
        [
            {name: m.value for name, m in result.measures.items() if "norm" in name or "update" in name}
            for result in results
        ],
        weights,
        {(name, tensor.dtype) for part in parts for state in part.state.values() for name, tensor in state.items()},
        sum(tensor.untyped_storage().nbytes() for tensor in kept),
        sum(param.numel() for part in parts for group in part.param_groups for param in group["params"]),
    )


def trained(model_path: Path, parallel: dict[str, Any], optimizer: dict[str, Any]) -> Trained:
    from dapo_megatron.actor import topology
    from dapo_megatron.config import ParallelConfig

    topo = topology.initialize(ParallelConfig.model_validate(parallel))
    result = train(*build(model_path, topo, parallel, optimizer), topo)
    topology.shutdown()
    return result


def assert_same_updates(got: Trained, want: Trained, rel: float) -> None:
    for measures, wanted in zip(got.measures, want.measures, strict=True):
        assert len(wanted) > 10
        assert measures == pytest.approx(wanted, rel=rel)
    assert got.measures[0]["grad_norm"] > 2 * OPTIMIZER["clip_grad"]
    # A float32 number that differs in its last bit may be rounded the other way, and from then on all gradients differ.
    for name, tensor in got.weights.items():
        assert float((tensor != want.weights[name]).float().mean()) < 0.01
        torch.testing.assert_close(tensor, want.weights[name], rtol=2**-7, atol=1e-5)


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_remainders_lose_nothing(layout: str, tmp_path: Path) -> None:
    ranks, parallel = LAYOUTS[layout]
    model_path = save_qwen2(tmp_path, tied=layout == "pp2", dtype=torch.bfloat16)
    plain = run_distributed(trained, ranks, model_path, parallel, {})
    precise = run_distributed(trained, ranks, model_path, parallel, EXACT)
    for got, want in zip(precise, plain, strict=True):
        assert_same_updates(got, want, rel=1e-6)
        assert want.state_bytes == 12 * want.stepped
        assert got.state_bytes == 10 * got.stepped
        moments = {("exp_avg", torch.float32), ("exp_avg_sq", torch.float32)}
        assert (want.state, got.state) == (moments, moments | {("master_param", torch.int16)})


def test_moments_in_bfloat16(alone: Any, tmp_path: Path) -> None:
    save_qwen2(tmp_path, dtype=torch.bfloat16)
    want = train(*build(tmp_path, alone, {}, {}), alone)
    got = train(*build(tmp_path, alone, {}, SMALL), alone)
    assert got.state_bytes == 6 * got.stepped
    assert got.state == {("exp_avg", torch.bfloat16), ("exp_avg_sq", torch.bfloat16), ("master_param", torch.int16)}
    for measures, wanted in zip(got.measures, want.measures, strict=True):
        assert measures == pytest.approx(wanted, rel=5e-3)
    assert got.measures[0] != want.measures[0]


@pytest.mark.gpu
@pytest.mark.parametrize("layers", ["torch", "transformer_engine"])
def test_transformer_engines_own_step(alone: Any, layers: str, tmp_path: Path) -> None:
    pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
    save_qwen2(tmp_path, hidden=128, dtype=torch.bfloat16)
    model = {"dtype": "bfloat16", "layers": layers}
    plain, exact, small = (
        train(*build(tmp_path, alone, {}, optimizer, model=model), alone) for optimizer in ({}, EXACT, SMALL)
    )
    assert_same_updates(exact, plain, rel=1e-3)
    assert (plain.state_bytes, exact.state_bytes, small.state_bytes) == tuple(n * plain.stepped for n in (12, 10, 6))
    for measures, wanted in zip(small.measures, plain.measures, strict=True):
        assert measures == pytest.approx(wanted, rel=1e-2)


def test_the_state_goes_to_the_host_and_comes_back(alone: Any, tmp_path: Path) -> None:
    save_qwen2(tmp_path, dtype=torch.bfloat16)
    weights = []
    for offload in ([], ["optimizer", "parameters"]):
        actor, checkpoint = build(tmp_path, alone, {}, SMALL, memory={"offload": offload})
        (update,), _ = actor.with_old_logprobs([mini_batch(alone)])
        for _ in range(3):
            actor.update(update, ratio_loss, lr=1e-2)
            with actor.away():
                states = [
                    state for part in actor.optimizer.chained_optimizers for state in part.optimizer.state.values()
                ]
                left = sum(x.untyped_storage().nbytes() for state in states for x in state.values())
                assert states and (left == 0) == bool(offload)
        weights.append({name: tensor.clone() for name, tensor in checkpoint.export(actor.chunks)})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(("beta2", "decays"), [(1 - 2**-8, True), (0.998, False)])
def test_the_limit_on_a_second_moment_in_bfloat16(beta2: float, decays: bool) -> None:
    """Without a gradient, every number of bfloat16 between 1 and 2 becomes smaller, or some stay."""
    from tests.helpers.precise_adam import PreciseAdam

    numbers = torch.arange(1, 2, 2**-7, dtype=torch.bfloat16)
    param: Any = torch.zeros_like(numbers)
    param.decoupled_grad = torch.zeros(len(numbers))
    kept: Any = {"use_decoupled_grad": True, "master_weights": True, "store_param_remainders": True}
    adam = PreciseAdam([param], betas=(0.9, beta2), exp_avg_sq_dtype=torch.bfloat16, **kept)
    adam.step()
    adam.state[param]["exp_avg_sq"].copy_(numbers)
    adam.step()
    assert bool((adam.state[param]["exp_avg_sq"] < numbers).all()) == decays
