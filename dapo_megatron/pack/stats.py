"""Measures how well a packing uses the replicas."""

from __future__ import annotations

import math
from collections.abc import Iterable

from dapo_megatron.measures import Max, Mean, Measure
from dapo_megatron.pack.cost import cost
from dapo_megatron.pack.microbatch import slots, widths
from dapo_megatron.pack.mini_batches import Packed


def packing(packed: Packed, attention_tokens: float = math.inf) -> dict[str, Measure]:
    """Measure what `pack` made of the samples of a step; `attention_tokens` is what it was given.

    Returns:
        pack/waste: share of padding among all slots, micro-batches of nothing but padding included.
        pack/imbalance_tokens: slots of the fullest replica over their mean, less 1, in the worst update.
        pack/imbalance_cost: the same of `cost`, attention included: the part of its time that the mean replica waits.
        pack/micro_batches: micro-batches of each replica and update.
    """
    lengths = [sample.length for sample in packed.samples]
    # Of each replica, each mini-batch: the slots of all segments.
    segments = [
        [
            [
                width
                for bin_ in bins
                for width in widths([lengths[index] for index in bin_], packed.sequence_multiple, packed.total_multiple)
            ]
            for bins in replica
        ]
        for replica in packed.replicas
    ]
    tokens = [[sum(whole) for whole in replica] for replica in segments]
    costs = [[sum(cost(width, attention_tokens) for width in whole) for whole in replica] for replica in segments]
    total = sum(map(sum, tokens))
    first = packed.replicas[0]
    return {
        "pack/waste": Mean(total - sum(slots(length, 1) for length in lengths), total),
        "pack/imbalance_tokens": Max(max(map(_imbalance, zip(*tokens, strict=True)), default=0.0)),
        "pack/imbalance_cost": Max(max(map(_imbalance, zip(*costs, strict=True)), default=0.0)),
        "pack/micro_batches": Mean(sum(map(len, first)), len(first)),
    }


def _imbalance(loads: Iterable[float]) -> float:
    """Return how far the largest of the replicas' loads in one update is above their mean, as a share of it."""
    loads = list(loads)
    return max(loads) * len(loads) / sum(loads) - 1
