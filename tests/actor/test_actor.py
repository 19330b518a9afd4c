"""One rank: gradients, precision, and what a step refuses. Other layouts are in test_layouts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dapo_megatron.errors import ConfigError
from dapo_megatron.measures import Mean, values
from dapo_megatron.types import MicroBatch, TokenLoss
from tests.helpers.batches import (
    make_micro_batch,
    make_mini_batch,
    ratio_loss,
    reference_logprobs,
    worst_relative_error,
)
from tests.helpers.models import load_reference, make_config, save_qwen2


def build(model_path: Path, topo: Any, **sections: Any) -> tuple[Any, Any]:
    from dapo_megatron.actor.actor import Actor
    from dapo_megatron.weights.hf import HfCheckpoint

    trainable = sections.pop("trainable", True)
    checkpoint = HfCheckpoint(model_path)
    config = make_config(model_path, **sections)
    return Actor(config, topo, checkpoint, trainable=trainable), checkpoint


def exported(actor: Any, checkpoint: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint.export(actor.chunks)}


# Lengths that fall into several attention calls, one slot included.
BATCHES = [make_micro_batch([5, 130, 1, 90, 40], seed=1), make_micro_batch([200], seed=2)]


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_match_each_sequence_alone(alone: Any, tied: bool, tmp_path: Path) -> None:
    save_qwen2(tmp_path, tied=tied)
    actor, checkpoint = build(tmp_path, alone, optimizer={"clip_grad": 0.0}, rollout={"temperature": 0.8})
    (mini_batch,), _ = actor.with_old_logprobs([make_mini_batch(BATCHES)])
    actor.update(mini_batch, ratio_loss, lr=0.0)
    with torch.no_grad():
        for chunk in actor.chunks:
            for param in chunk.parameters():
                param.copy_(param.main_grad)
    got = exported(actor, checkpoint)

    model = load_reference(tmp_path)
    total = torch.zeros((), dtype=torch.float64)
    for batch in BATCHES:
        logprobs_T = reference_logprobs(model, batch, 0.8)
        total = total + ratio_loss(logprobs_T, replace(batch, old_logprobs_T=logprobs_T.detach())).loss_sum
    (total / mini_batch.loss_tokens).backward()
    want = {name: param.grad for name, param in model.named_parameters()}
    assert worst_relative_error(got, want) < 1e-5


RECOMPUTE = [
    {"recompute": "full"},
    {"recompute": "full", "recompute_layers": 1},
    *({"recompute": "selective", "recompute_modules": [name]} for name in ("core_attn", "mlp")),
]


@pytest.mark.parametrize("memory", [{}, *RECOMPUTE], ids=lambda memory: "-".join(map(str, memory.values())) or "none")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_ratio_is_exactly_one_and_what_is_recomputed_is_the_same(
    alone: Any, dtype: str, memory: dict[str, Any], tmp_path: Path
) -> None:
    save_qwen2(tmp_path)
    weights = []
    for settings in ({}, memory):
        actor, checkpoint = build(tmp_path, alone, model={"dtype": dtype}, memory=settings)
        (mini_batch,), _ = actor.with_old_logprobs([make_mini_batch(BATCHES)])
        result = actor.update(mini_batch, ratio_loss, lr=1e-3)
        assert (result["ratio/mean"], result["ratio/max"]) == (1.0, 1.0)
        assert result["grad_norm"] > 0
        weights.append(exported(actor, checkpoint))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_offloaded_takes_no_memory_and_comes_back_bit_for_bit(alone: Any, dtype: str, tmp_path: Path) -> None:
    save_qwen2(tmp_path)
    weights = []
    for offload in ([], ["optimizer", "gradients", "parameters"]):
        actor, checkpoint = build(tmp_path, alone, model={"dtype": dtype}, memory={"offload": offload})
        for _ in range(3):  # there is no optimizer state before the first
            with actor.away():
                left = sum(size for kind in (parameters, gradients, moments) for size in kind(actor))
                assert (left == 0) == bool(offload)
            actor.update(*filled(actor), ratio_loss, lr=1e-3)
        weights.append(exported(actor, checkpoint))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_leaves_leaves_in_turns(alone: Any, tmp_path: Path) -> None:
    save_qwen2(tmp_path)
    actor, _ = build(tmp_path, alone, memory={"offload": ["optimizer", "gradients", "parameters"]})
    actor.update(*filled(actor), ratio_loss, lr=1e-3)

    def there() -> tuple[bool, ...]:
        return tuple(sum(kind(actor)) > 0 for kind in (parameters, gradients, moments))

    shown: list[str] = []

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        shown.append(name)
        yield

    actor.leave(phase, keeping=["parameters"])
    assert there() == (True, False, False)
    actor.leave(phase)
    assert there() == (False, False, False)
    actor.come_back(phase, only=["parameters"])
    assert there() == (True, False, False)
    actor.come_back(phase)
    assert there() == (True, True, True)
    assert shown == ["offload"] * 4
    unmoved, _ = build(tmp_path, alone)
    unmoved.leave(phase)
    unmoved.come_back(phase)
    assert shown == ["offload"] * 4


def filled(actor: Any) -> list[Any]:
    return actor.with_old_logprobs([make_mini_batch(BATCHES)])[0]


def parameters(actor: Any) -> list[int]:
    return [param.untyped_storage().nbytes() for chunk in actor.chunks for param in chunk.parameters()]


def gradients(actor: Any) -> list[int]:
    return [buffer.grad_data.untyped_storage().nbytes() for module in actor._modules for buffer in module.buffers]


def moments(actor: Any) -> list[int]:
    states = [state for part in actor.optimizer.chained_optimizers for state in part.optimizer.state.values()]
    return [state[name].untyped_storage().nbytes() for state in states for name in ("exp_avg", "exp_avg_sq")]


def test_bfloat16_keeps_small_steps_in_float32(alone: Any, tmp_path: Path) -> None:
    """One step is below bfloat16's resolution near 1, which is 2^-8 to 2^-7; thirty are not."""
    save_qwen2(tmp_path, dtype=torch.bfloat16)
    actor, checkpoint = build(tmp_path, alone, model={"dtype": "bfloat16"})
    before = exported(actor, checkpoint)["model.norm.weight"]
    (mini_batch,), _ = actor.with_old_logprobs([make_mini_batch([make_micro_batch([9], seed=1)])])
    actor.update(mini_batch, ratio_loss, lr=2e-4)
    once = exported(actor, checkpoint)["model.norm.weight"]
    for _ in range(29):
        actor.update(mini_batch, ratio_loss, lr=2e-4)
    after = exported(actor, checkpoint)["model.norm.weight"]
    assert after.dtype is torch.bfloat16
    assert torch.equal(once, before)
    assert not torch.equal(after, before)


def test_a_mini_batch_without_loss_tokens_changes_nothing(alone: Any, tmp_path: Path) -> None:
    save_qwen2(tmp_path)
    actor, checkpoint = build(tmp_path, alone)
    before = exported(actor, checkpoint)
    (mini_batch,), found = actor.with_old_logprobs([make_mini_batch([make_micro_batch([8, 4], seed=3, masked=True)])])
    result = actor.update(mini_batch, ratio_loss, lr=1.0)
    assert (result.loss_tokens, result.skipped) == (0, None)
    assert result.measures["loss"] == found["entropy"] == found["top_prob"] == Mean(0, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in exported(actor, checkpoint).items())


@pytest.mark.parametrize("broken", ["loss", "gradient", "metric"])
def test_what_is_not_finite_is_skipped_and_changes_nothing(alone: Any, broken: str, tmp_path: Path) -> None:
    def loss(logprobs_T: Tensor, batch: MicroBatch, *_: Any) -> TokenLoss:
        total = logprobs_T.sum()
        if broken == "loss":
            total = total * torch.nan
        if broken == "gradient":
            total = (total - total.detach()).sqrt()
        ratio = torch.full((), torch.inf if broken == "metric" else 1.0)
        return TokenLoss(total, batch.loss_mask_T.sum(), {"ratio/mean": Mean(ratio)})

    save_qwen2(tmp_path)
    actor, checkpoint = build(tmp_path, alone)
    before = exported(actor, checkpoint)
    result = actor.update(make_mini_batch(BATCHES), loss, lr=1e-3)
    want = {"loss": "loss is nan", "gradient": r"grad_norm/norm is (nan|inf)", "metric": "ratio/mean is inf"}
    assert result.skipped is not None and re.fullmatch(want[broken], result.skipped)
    assert all(torch.equal(tensor, before[name]) for name, tensor in exported(actor, checkpoint).items())

    (mini_batch,), _ = actor.with_old_logprobs([make_mini_batch(BATCHES)])
    result = actor.update(mini_batch, ratio_loss, lr=1e-3)
    assert result.skipped is None
    assert all(tensor.isfinite().all() for tensor in exported(actor, checkpoint).values())


def test_a_mean_over_nothing_skips_no_update(alone: Any, tmp_path: Path) -> None:
    save_qwen2(tmp_path)
    actor, _ = build(tmp_path, alone)
    (mini_batch,), _ = actor.with_old_logprobs([make_mini_batch(BATCHES)])

    def loss(*given: Any) -> TokenLoss:
        nothing = torch.zeros((), dtype=torch.int64)
        return replace(ratio_loss(*given), measures={"ratio/of_none": Mean(nothing.float(), nothing)})

    assert actor.update(mini_batch, loss, lr=1e-2).skipped is None


def test_larger_passes_for_logprobs_give_the_same_up_to_rounding(alone: Any, tmp_path: Path) -> None:
    save_qwen2(tmp_path)
    batches = [*BATCHES, make_micro_batch([30, 2], seed=4), make_micro_batch([17], seed=5)]
    actor, _ = build(tmp_path, alone)
    (apart,), measures = actor.with_old_logprobs([make_mini_batch(batches)])
    settings = {"mini_batch": 8, "micro_batch_tokens": 266, "logprob_tokens": 500}
    actor, _ = build(tmp_path, alone, train=settings)
    passes = []
    actor.chunks[0].register_forward_pre_hook(lambda module, inputs: passes.append(inputs[0].shape[1]))
    (together,), together_measures = actor.with_old_logprobs([make_mini_batch(batches)])
    assert passes == [498, 17]
    assert values(together_measures) == pytest.approx(values(measures), rel=1e-6)
    for a, b in zip(apart.micro_batches, together.micro_batches, strict=True):
        assert a.old_logprobs_T is not None and b.old_logprobs_T is not None
        torch.testing.assert_close(a.old_logprobs_T, b.old_logprobs_T, rtol=0, atol=1e-5)
    result = actor.update(together, ratio_loss, lr=1e-3)
    assert result["ratio/max"] == pytest.approx(1.0, abs=1e-5)


def test_only_scored_slots_go_through_the_output_layer(alone: Any, tmp_path: Path) -> None:
    save_qwen2(tmp_path)
    actor, _ = build(tmp_path, alone)
    rows = []
    actor.chunks[0].output_layer.register_forward_hook(lambda layer, inputs, output: rows.append(output[0].shape[0]))
    empty = make_micro_batch([8, 4], seed=3, masked=True)
    actor.with_old_logprobs([make_mini_batch([*BATCHES, empty])])
    assert rows == [int(BATCHES[0].scored_T.sum()), int(BATCHES[1].scored_T.sum()), 1]


def test_a_frozen_reference_fills_its_own_field(alone: Any, tmp_path: Path) -> None:
    save_qwen2(tmp_path)
    actor, _ = build(tmp_path, alone)
    frozen, _ = build(tmp_path, alone, trainable=False)
    (mini_batch,) = frozen.with_ref_logprobs([make_mini_batch(BATCHES)])
    (mini_batch,), _ = actor.with_old_logprobs([mini_batch])
    for batch in mini_batch.micro_batches:
        torch.testing.assert_close(batch.ref_logprobs_T, batch.old_logprobs_T, rtol=1e-6, atol=1e-6)
    assert frozen.optimizer is None
    assert not any(param.requires_grad for chunk in frozen.chunks for param in chunk.parameters())


def test_an_unsplittable_model_is_refused(alone: Any, tmp_path: Path) -> None:
    save_qwen2(tmp_path)
    with pytest.raises(ConfigError, match=r"tp\(8\) does not divide the model's num_attention_heads\(4\)"):
        build(tmp_path, alone, parallel={"tp": 8})


def test_an_offloaded_reference_takes_memory_only_while_it_is_used(alone: Any, tmp_path: Path) -> None:
    save_qwen2(tmp_path)
    mini_batches = [make_mini_batch(BATCHES)]
    kept, _ = build(tmp_path, alone, trainable=False)
    offloaded, _ = build(tmp_path, alone, memory={"offload_reference": True}, trainable=False)
    for _ in range(2):
        assert (sum(parameters(kept)) > 0, sum(parameters(offloaded))) == (True, 0)
        (want,), (got,) = kept.with_ref_logprobs(mini_batches), offloaded.with_ref_logprobs(mini_batches)
        for wanted, given in zip(want.micro_batches, got.micro_batches, strict=True):
            assert torch.equal(given.ref_logprobs_T, wanted.ref_logprobs_T)
