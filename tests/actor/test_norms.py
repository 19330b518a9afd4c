"""Norms of gradients, weights and updates against one float64 process and Megatron's own gradient norm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dapo_megatron.check_reduction.reference import as_in_files
from tests.helpers.batches import make_micro_batch, make_mini_batch, ratio_loss, reference_logprobs
from tests.helpers.distributed import run_distributed
from tests.helpers.models import load_reference, make_config, save_qwen2, save_tiny

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {"distributed_optimizer": True}),
    "dp2-plain": (2, {"distributed_optimizer": False}),
    "tp2-sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "cp2": (2, {"cp": 2}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}),
}
CASES = [("one", False), ("dp2", True), ("dp2-plain", False), ("tp2-sp", False), ("pp2", True), ("cp2", False)]
CASES += [("pp2-vpp2", True)]
# Not clipped, so that the gradients are still those of the backward pass after a step.
OPTIMIZER = {"lr": 1e-2, "eps": 1e-5, "weight_decay": 0.1, "clip_grad": 0.0}
LR = (1e-2, 5e-3)
HF_KINDS = {"norm": "norm", "embed_tokens": "embedding", "self_attn": "attention", "mlp": "mlp", "lm_head": "output"}


def kind_of(hf_name: str) -> str:
    return next(kind for fragment, kind in HF_KINDS.items() if fragment in hf_name)


def norms_by_kind(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """Computes float64 norms of tensors with Hugging Face names."""
    squares: dict[str, float] = {}
    for name, tensor in tensors:
        squares[kind_of(name)] = squares.get(kind_of(name), 0.0) + float(tensor.double().square().sum())
    return {kind: math.sqrt(square) for kind, square in squares.items()}


def of(measured: dict[str, float], quantity: str) -> dict[str, float]:
    """`{"grad_norm/mlp": 1.0}` -> `{"mlp": 1.0}`."""
    return {name.split("/")[1]: value for name, value in measured.items() if name.startswith(f"{quantity}/")}


def all_batches() -> list[Any]:
    return [make_micro_batch(lengths, seed=len(lengths), multiple=4) for lengths in ([12, 28, 5], [9, 21])]


class Measured(NamedTuple):
    gradients: dict[str, float]
    updates: dict[str, float]
    total: float
    """Gradient norm by Megatron."""
    exported: dict[str, Tensor]
    """Parameters after the step."""


def measure(model_path: Path, parallel: dict[str, Any]) -> tuple[dict[str, Tensor], list[Measured]]:
    """Returns what a rank sees: parameters as loaded, and both steps."""
    from dapo_megatron.actor import topology
    from dapo_megatron.actor.actor import Actor
    from dapo_megatron.actor.norms import ParameterNorms
    from dapo_megatron.weights.hf import HfCheckpoint

    config = make_config(model_path, parallel=parallel, optimizer=OPTIMIZER)
    topo = topology.initialize(config.parallel)
    checkpoint = HfCheckpoint(model_path)
    actor = Actor(config, topo, checkpoint)
    norms = ParameterNorms(actor.optimizer, actor.chunks)

    def export() -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in checkpoint.export(actor.chunks)}

    loaded, batches = export(), all_batches()
    share = len(batches) // topo.dp
    mine = batches[topo.dp_rank * share : (topo.dp_rank + 1) * share]
    (update,), _ = actor.with_old_logprobs([make_mini_batch(mine, sum(batch.loss_tokens for batch in batches))])
    steps = []
    for lr in LR:
        actor.update(update, ratio_loss, lr=lr)
        total = float(actor.optimizer.get_grad_norm())
        steps.append(Measured(norms.gradients(), norms.updates(), total, export()))
    topology.shutdown()
    return loaded, steps


def reference_gradients(model_path: Path, loaded: dict[str, Tensor]) -> dict[str, float]:
    """Computes norms of the first step's gradients with Hugging Face's model in float64."""
    model = load_reference(model_path)
    assert set(as_in_files(dict(model.named_parameters()))) == set(loaded)
    with torch.no_grad():
        batches = [replace(batch, old_logprobs_T=reference_logprobs(model, batch)) for batch in all_batches()]
    loss = torch.stack([ratio_loss(reference_logprobs(model, batch), batch).loss_sum for batch in batches]).sum()
    (loss / sum(batch.loss_tokens for batch in batches)).backward()
    return norms_by_kind((name, param.grad) for name, param in model.named_parameters())


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize(("layout", "tied"), CASES, ids=[name + ("-tied" if tied else "") for name, tied in CASES])
def test_every_layout_measures_the_same_model(layout: str, tied: bool, tmp_path: Path) -> None:
    check_measures(save_qwen2(tmp_path, tied=tied, layers=4), *LAYOUTS[layout], tied=tied)


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"ep": 2}, {"ep": 2, "tp": 2, "sequence_parallel": True}], ids=["ep2", "tp2-ep2"])
def test_so_do_ranks_that_share_out_experts(parallel: dict[str, Any], tmp_path: Path) -> None:
    model_path = save_tiny(tmp_path, "qwen3_moe", tied=False)
    check_measures(model_path, 2 * parallel.get("tp", 1), parallel, tied=False)


def check_measures(model_path: Path, ranks: int, parallel: dict[str, Any], *, tied: bool) -> None:
    results = run_distributed(measure, ranks, model_path, parallel)
    before, steps = results[0]
    kinds = {"norm", "embedding", "attention", "mlp"} if tied else {"norm", "embedding", "attention", "mlp", "output"}
    assert of(steps[0].gradients, "grad_norm") == pytest.approx(reference_gradients(model_path, before), rel=1e-6)
    for step in steps:
        squares = [norm**2 for norm in of(step.gradients, "grad_norm").values()]
        assert math.sqrt(sum(squares)) == pytest.approx(step.total, rel=1e-6)
        after = step.exported
        weights = norms_by_kind(after.items())
        changes = norms_by_kind((name, after[name].double() - before[name].double()) for name in after)
        assert of(step.updates, "weight_norm") == pytest.approx(weights, rel=1e-6)
        ratios = {kind: changes[kind] / weights[kind] for kind in kinds}
        assert of(step.updates, "update_ratio") == pytest.approx(ratios, rel=1e-4)
        before = after
    for _, other in results:
        assert [(step.gradients, step.updates) for step in other] == [(step.gradients, step.updates) for step in steps]


def measure_bfloat16(model_path: Path, distributed_optimizer: bool) -> tuple[Any, Any, dict[str, float], float]:
    """Returns a rank's parts of the float32 main parameters before and after a step, by name, and the norms."""
    from dapo_megatron.actor import topology
    from dapo_megatron.actor.actor import Actor
    from dapo_megatron.actor.norms import ParameterNorms
    from dapo_megatron.weights.hf import HfCheckpoint

    parallel = {"distributed_optimizer": distributed_optimizer}
    config = make_config(model_path, parallel=parallel, optimizer=OPTIMIZER, model={"dtype": "bfloat16"})
    topo = topology.initialize(config.parallel)
    actor = Actor(config, topo, HfCheckpoint(model_path))
    norms = ParameterNorms(actor.optimizer, actor.chunks)

    def main_parameters() -> dict[str, Tensor]:
        named: list[tuple[str, Any]] = [pair for chunk in actor.chunks for pair in chunk.named_parameters()]
        mains = {name: getattr(param, "main_param", None) for name, param in named}
        return {name: main.detach().clone() for name, main in mains.items() if main is not None}

    batches = all_batches()
    (update,), _ = actor.with_old_logprobs(
        [make_mini_batch(batches[topo.dp_rank :: topo.dp], sum(batch.loss_tokens for batch in batches))]
    )
    before = main_parameters()
    actor.update(update, ratio_loss, lr=1e-2)
    measured = norms.gradients() | norms.updates()
    total = float(actor.optimizer.get_grad_norm())
    topology.shutdown()
    return before, main_parameters(), measured, total


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "distributed_optimizer"), [(1, False), (2, True)])
def test_bfloat16_is_measured_on_float32_main_parameters(
    ranks: int, distributed_optimizer: bool, tmp_path: Path
) -> None:
    model_path = save_qwen2(tmp_path, tied=False, dtype=torch.bfloat16)
    results = run_distributed(measure_bfloat16, ranks, model_path, distributed_optimizer)
    weights, changes = {"mlp": 0.0}, {"mlp": 0.0}
    for before, after, _, _ in results:
        for name in (name for name in after if "mlp.linear" in name):
            assert after[name].dtype is torch.float32
            weights["mlp"] += float(after[name].double().square().sum())
            changes["mlp"] += float((after[name].double() - before[name].double()).square().sum())
    for _, _, measured, total in results:
        assert measured == results[0][2]
        squares = [norm**2 for norm in of(measured, "grad_norm").values()]
        assert math.sqrt(sum(squares)) == pytest.approx(total, rel=1e-6)
        assert measured["weight_norm/mlp"] == pytest.approx(math.sqrt(weights["mlp"]), rel=1e-6)
        assert measured["update_ratio/mlp"] == pytest.approx(math.sqrt(changes["mlp"] / weights["mlp"]), rel=1e-4)


def build(model_path: Path, topo: Any) -> tuple[Any, Any]:
    """Builds an actor of one rank, which has made a step."""
    from dapo_megatron.actor.actor import Actor
    from dapo_megatron.actor.norms import ParameterNorms
    from dapo_megatron.weights.hf import HfCheckpoint

    save_qwen2(model_path)
    actor = Actor(make_config(model_path, optimizer=OPTIMIZER), topo, HfCheckpoint(model_path))
    (update,), _ = actor.with_old_logprobs([make_mini_batch(all_batches())])
    actor.update(update, ratio_loss, lr=1e-2)
    return actor, ParameterNorms(actor.optimizer, actor.chunks)


def test_parameters_are_measured_some_at_a_time(alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dapo_megatron.actor import norms

    actor, whole = build(tmp_path, alone)
    want = whole.gradients() | whole.updates()
    sizes = []
    original = norms._squares
    monkeypatch.setattr(norms, "_squares", lambda some: sizes.append(sum(x.numel() for x in some)) or original(some))
    monkeypatch.setattr(norms, "_CHUNK", 2000)
    parts = norms.ParameterNorms(actor.optimizer, actor.chunks)
    assert parts.gradients() | parts.updates() == pytest.approx(want, rel=1e-12)
    largest = max(param.numel() for param in actor.chunks[0].parameters())
    assert len(sizes) > 3 and max(sizes) < 2000 + largest


def test_a_large_parameter_is_summed_in_float64() -> None:
    from dapo_megatron.actor.norms import _squares

    weight = torch.full((2**22,), 0.1)
    assert float(_squares([weight])) == pytest.approx(2**22 * float(weight[0].double()) ** 2, rel=1e-9)


def test_only_the_kind_that_is_not_finite_shows_so(alone: Any, tmp_path: Path) -> None:
    actor, norms = build(tmp_path, alone)
    before = norms.gradients()
    named = dict(actor.chunks[0].named_parameters())
    named["decoder.layers.1.mlp.linear_fc2.weight"].main_grad[0, 0] = math.inf
    assert norms.gradients() == before | {"grad_norm/mlp": math.inf}


def test_a_parameter_of_no_kind_counts_as_another(alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dapo_megatron.actor import norms

    actor, known = build(tmp_path, alone)
    want = known.gradients() | known.updates()
    monkeypatch.setattr(norms, "KINDS", {kind: part for kind, part in norms.KINDS.items() if kind != "mlp"})
    unknown = norms.ParameterNorms(actor.optimizer, actor.chunks)
    got = unknown.gradients() | unknown.updates()
    assert got == {name.replace("/mlp", "/other"): value for name, value in want.items()}
