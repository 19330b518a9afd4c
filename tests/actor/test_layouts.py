"""Two optimizer steps in every layout give the parameters that one float64 process gets."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dapo_megatron.measures import values
from dapo_megatron.types import MicroBatch
from tests.helpers.batches import (
    make_micro_batch,
    make_mini_batch,
    ratio_loss,
    reference_logprobs,
    worst_relative_error,
)
from tests.helpers.distributed import run_distributed
from tests.helpers.models import load_reference, make_config, save_qwen2

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "dp2": {"distributed_optimizer": True},
    "dp2-plain": {"distributed_optimizer": False},
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2-vpp2": {"pp": 2, "vpp": 2},
    "dp2-overlap": {"overlap_grad_reduce": True},
    "dp2-param-overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "cp2": {"cp": 2},
    "tp2-cp2-sp": {"tp": 2, "cp": 2, "sequence_parallel": True},
    "pp2-vpp2-dp2-overlap": {"pp": 2, "vpp": 2, "overlap_grad_reduce": True},
    "pp2-vpp2-dp2-param-overlap": {"pp": 2, "vpp": 2, "overlap_grad_reduce": True, "overlap_param_gather": True},
}
RANKS = {"one": 1, "tp2-cp2-sp": 4, "pp2-vpp2-dp2-overlap": 4, "pp2-vpp2-dp2-param-overlap": 4}
SMALL_BUCKETS = 5000
"""Numbers in a bucket of gradients and parameters, where they are reduced and gathered bucket by bucket."""
CASES = [(name, False) for name in LAYOUTS] + [(name, True) for name in ("one", "dp2", "tp2", "pp2", "pp2-vpp2")]
OPTIMIZER = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1, "clip_grad": 0.5}
LR = (1e-2, 5e-3)


def all_batches() -> list[MicroBatch]:
    """Uneven micro-batches, the third without a loss token. Padded so that every layout can split them."""
    shapes = [([12, 28, 5], False), ([40], False), ([9, 9], True), ([3, 21, 16, 7, 1], False)]
    return [
        make_micro_batch(lengths, seed=seed, multiple=4, masked=masked) for seed, (lengths, masked) in enumerate(shapes)
    ]


def reference(model_path: Path) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Parameters after two steps, with the losses and gradient norms."""
    model = load_reference(model_path)
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": OPTIMIZER["weight_decay"]},
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, eps=OPTIMIZER["eps"], betas=(0.9, 0.999))
    with torch.no_grad():
        batches = [replace(b, old_logprobs_T=reference_logprobs(model, b, 0.7)) for b in all_batches()]
    count = sum(batch.loss_tokens for batch in batches)
    losses, norms = [], []
    for lr in LR:
        optimizer.zero_grad()
        total = torch.stack([ratio_loss(reference_logprobs(model, b, 0.7), b).loss_sum for b in batches]).sum() / count
        total.backward()
        losses.append(total.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, OPTIMIZER["clip_grad"])))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    names = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del names["lm_head.weight"]
    return names, losses, norms


class Case(NamedTuple):
    ranks: list[dict[str, Any]]
    model_path: Path
    saved: Path


def train(model_path: Path, parallel: dict[str, Any], saved: Path) -> dict[str, Any]:
    """What a rank sees: two steps, an export, a saved checkpoint, and a mini-batch with a wrong count."""
    from dapo_megatron.actor import optimizer, topology
    from dapo_megatron.actor.actor import Actor, TokenCountError
    from dapo_megatron.weights.hf import HfCheckpoint

    config = make_config(model_path, parallel=parallel, optimizer=OPTIMIZER, rollout={"temperature": 0.7})
    topo = topology.initialize(config.parallel)
    checkpoint = HfCheckpoint(model_path)
    ddp_config = partial(optimizer.DistributedDataParallelConfig, bucket_size=SMALL_BUCKETS)
    with patch.object(optimizer, "DistributedDataParallelConfig", ddp_config):
        actor = Actor(config, topo, checkpoint)
    loaded = {name: tensor.clone() for name, tensor in checkpoint.export(actor.chunks)}
    batches = all_batches()
    share = len(batches) // topo.dp
    own = batches[topo.dp_rank * share : (topo.dp_rank + 1) * share]
    mini_batch = make_mini_batch(own, sum(b.loss_tokens for b in batches))
    (mini_batch,), measures = actor.with_old_logprobs([mini_batch])
    (mini_batch,) = Actor(config, topo, checkpoint, trainable=False).with_ref_logprobs([mini_batch])
    results = [actor.update(mini_batch, ratio_loss, lr=lr) for lr in LR]
    trained = {name: tensor.clone() for name, tensor in checkpoint.export(actor.chunks)}
    checkpoint.save(actor.chunks, saved)
    try:
        actor.update(replace(mini_batch, loss_tokens=mini_batch.loss_tokens + 1), ratio_loss, lr=1e-3)
        complaint = ""
    except TokenCountError as error:
        complaint = str(error)
    logprobs = [batch.old_logprobs_T for batch in mini_batch.micro_batches]
    dp_rank = topo.dp_rank
    topology.shutdown()
    return {
        "loaded": loaded,
        "trained": trained,
        "results": results,
        "means": values(measures),
        "logprobs": logprobs,
        "ref_logprobs": [batch.ref_logprobs_T for batch in mini_batch.micro_batches],
        "complaint": complaint,
        "dp_rank": dp_rank,
    }


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0] + ("-tied" if case[1] else ""))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    layout, tied = request.param
    model_path = save_qwen2(tmp_path_factory.mktemp("model"), tied=tied, layers=4)
    saved = tmp_path_factory.mktemp("saved")
    return Case(run_distributed(train, RANKS.get(layout, 2), model_path, LAYOUTS[layout], saved), model_path, saved)


pytestmark = [pytest.mark.multiproc, pytest.mark.slow]


def test_two_steps_match_float64(case: Case) -> None:
    want, losses, norms = reference(case.model_path)
    for rank in case.ranks:
        assert worst_relative_error(rank["trained"], want) < 1e-5
        assert [result["loss"] for result in rank["results"]] == pytest.approx(losses, rel=1e-5, abs=1e-7)
        assert [result["grad_norm"] for result in rank["results"]] == pytest.approx(norms, rel=1e-5)


def test_every_rank_reports_the_same(case: Case) -> None:
    assert all(rank["results"] == case.ranks[0]["results"] for rank in case.ranks)
    assert all(rank["means"] == case.ranks[0]["means"] for rank in case.ranks)


def test_first_ratio_is_exactly_one(case: Case) -> None:
    first, second = case.ranks[0]["results"]
    assert (first["ratio/mean"], first["ratio/max"]) == (1.0, 1.0)
    assert second["ratio/max"] > 1.0


def test_old_logprobs_are_those_of_whole_sequences(case: Case) -> None:
    model = load_reference(case.model_path)
    with torch.no_grad():
        want = [reference_logprobs(model, batch, 0.7) * batch.scored_T for batch in all_batches()]
    for rank in case.ranks:
        share = len(rank["logprobs"])
        for got_T, want_T in zip(rank["logprobs"], want[rank["dp_rank"] * share :], strict=False):
            torch.testing.assert_close(got_T.double(), want_T, rtol=1e-5, atol=1e-5)


def test_a_frozen_reference_with_the_same_weights_says_the_same(case: Case) -> None:
    for rank in case.ranks:
        assert rank["ref_logprobs"]
        for ref_T, old_T in zip(rank["ref_logprobs"], rank["logprobs"], strict=True):
            torch.testing.assert_close(ref_T, old_T, rtol=1e-6, atol=1e-6)


def test_entropy_and_top_probability_are_means_over_all_loss_tokens(case: Case) -> None:
    model = load_reference(case.model_path)
    entropies, tops, count = 0.0, 0.0, 0
    for batch in all_batches():
        for start, end in pairwise(batch.cu_seqlens.tolist()):
            with torch.no_grad():
                logits = model(batch.tokens_T[None, start:end]).logits[0] / 0.7
            mask = batch.loss_mask_T[start:end]
            distribution = torch.distributions.Categorical(logits=logits)
            entropies += float((distribution.entropy() * mask).sum())
            tops += float((distribution.probs.amax(-1) * mask).sum())
            count += int(mask.sum())
    assert case.ranks[0]["means"] == pytest.approx({"entropy": entropies / count, "top_prob": tops / count}, rel=1e-5)


def test_wrong_count_is_an_error_with_both_numbers(case: Case) -> None:
    count = sum(batch.loss_tokens for batch in all_batches())
    for rank in case.ranks:
        assert f"divided by {count} loss tokens" in rank["complaint"]
        assert f"built with {count + 1};" in rank["complaint"]


def test_load_and_export_are_bit_exact(case: Case) -> None:
    model = load_reference(case.model_path, torch.float32)
    want = model.state_dict()
    if model.config.tie_word_embeddings:
        del want["lm_head.weight"]
    for rank in case.ranks:
        assert rank["loaded"].keys() == want.keys()
        assert all(torch.equal(rank["loaded"][name], want[name]) for name in want)


def test_saved_checkpoint_reloads_bit_exact(case: Case) -> None:
    model = load_reference(case.saved, torch.float32)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in case.ranks[0]["trained"].items())
    assert (case.saved / "tokenizer_config.json").is_file()
