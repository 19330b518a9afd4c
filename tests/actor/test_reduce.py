from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist


def test_a_sum_over_ranks_adds_up_its_gradient(alone: Any, monkeypatch: Any) -> None:
    """With an all-reduce that doubles, as if another rank held the same."""
    from dapo_megatron.actor.reduce import SumOverRanks

    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: tensor.mul_(2))
    part, weights = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([5.0, 7.0])
    with warnings.catch_warnings(action="error"):
        total = SumOverRanks.apply(part, dist.group.WORLD)
        (total * weights).sum().backward()
    assert (part.tolist(), total.tolist(), weights.tolist()) == ([1, 3], [2, 6], [5, 7])
    assert part.grad is not None and part.grad.tolist() == [10, 14]
