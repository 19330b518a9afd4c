"""An update that is not finite on one rank is skipped on all, and leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_megatron.config import AlgoConfig
from tests.helpers.batches import make_micro_batch
from tests.helpers.distributed import run_distributed
from tests.helpers.models import make_config, save_qwen2

pytestmark = [pytest.mark.multiproc, pytest.mark.slow]


def train(model: Path, parallel: dict[str, Any], dtype: str) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """Two good mini-batches by themselves; the same after one whose last replica has a nan; why that was skipped."""
    from dapo_megatron.actor import topology
    from dapo_megatron.actor.actor import Actor
    from dapo_megatron.algo.objective import Objective
    from dapo_megatron.types import MiniBatch
    from dapo_megatron.weights.hf import HfCheckpoint

    config = make_config(model, model={"dtype": dtype}, parallel=parallel)
    topo = topology.initialize(config.parallel)
    checkpoint, loss = HfCheckpoint(model), Objective(AlgoConfig())
    batches = [make_micro_batch(lengths, seed=len(lengths), multiple=4) for lengths in ([12, 28], [40], [9, 3, 5], [7])]
    share = len(batches) // topo.dp
    own = batches[topo.dp_rank * share : (topo.dp_rank + 1) * share]
    mini_batch = MiniBatch(tuple(own), sum(batch.loss_tokens for batch in batches))

    def after(spoil: bool) -> tuple[dict[str, Any], str | None]:
        actor = Actor(config, topo, checkpoint)
        (good,), _ = actor.with_old_logprobs([mini_batch])
        skipped = None
        if spoil:
            *others, last = good.micro_batches
            if topo.dp_rank == topo.dp - 1:
                last = replace(last, advantages_T=torch.full_like(last.advantages_T, torch.nan))
            skipped = actor.update(replace(good, micro_batches=(*others, last)), loss, lr=1e-2).skipped
        for _ in range(2):
            assert actor.update(good, loss, lr=1e-2).skipped is None
        return {name: tensor.clone() for name, tensor in checkpoint.export(actor.chunks)}, skipped

    undisturbed, _ = after(spoil=False)
    disturbed, skipped = after(spoil=True)
    topology.shutdown()
    return undisturbed, disturbed, skipped


@pytest.mark.parametrize(
    ("parallel", "dtype"),
    [
        ({"overlap_grad_reduce": True}, "float32"),
        ({"distributed_optimizer": False}, "bfloat16"),
        ({"pp": 2, "vpp": 2}, "bfloat16"),
    ],
    ids=["dp2-overlap", "dp2-plain", "pp2-vpp2"],
)
def test_a_skipped_update_leaves_no_trace(parallel: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    model = save_qwen2(tmp_path, layers=4)
    for undisturbed, disturbed, skipped in run_distributed(train, 2, model, parallel, dtype):
        assert skipped == "loss is nan"
        assert all(torch.equal(disturbed[name], tensor) for name, tensor in undisturbed.items())
