"""Measures how well a packing uses the replicas."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from dapo_megatron.measures import Max, Mean, Measure
from dapo_megatron.pack.cost import cost
from dapo_megatron.pack.microbatch import slots
from dapo_megatron.types import MicroBatch, MiniBatch, TrainSample


def packing(
    samples: Sequence[TrainSample], replicas: Sequence[Sequence[MiniBatch]], attention_tokens: float = math.inf
) -> dict[str, Measure]:
    """Measure what `pack` made of the samples of a step; `attention_tokens` is what it was given.

    Returns:
        pack/waste: share of padding among all slots, micro-batches of nothing but padding included.
        pack/imbalance_tokens: slots of the fullest replica over their mean, less 1, in the worst update.
        pack/imbalance_cost: the same of `cost`, attention included: the part of its time that the mean replica waits.
        pack/micro_batches: micro-batches of each replica and update.
    """
    tokens = [[sum(batch.slots for batch in whole.micro_batches) for whole in replica] for replica in replicas]
    costs = [
        [sum(_cost(b, attention_tokens) for b in whole.micro_batches) for whole in replica] for replica in replicas
    ]
    total = sum(map(sum, tokens))
    return {
        "pack/waste": Mean(total - sum(slots(sample, 1) for sample in samples), total),
        "pack/imbalance_tokens": Max(max(map(_imbalance, zip(*tokens, strict=True)), default=0.0)),
        "pack/imbalance_cost": Max(max(map(_imbalance, zip(*costs, strict=True)), default=0.0)),
        "pack/micro_batches": Mean(sum(len(whole.micro_batches) for whole in replicas[0]), len(replicas[0])),
    }


def _cost(batch: MicroBatch, attention_tokens: float) -> float:
    return sum(cost(end - start, attention_tokens) for start, end in pairwise(batch.cu_seqlens.tolist()))


def _imbalance(loads: Iterable[float]) -> float:
    """Return how far the largest of the replicas' loads in one update is above their mean, as a share of it."""
    loads = list(loads)
    return max(loads) * len(loads) / sum(loads) - 1
