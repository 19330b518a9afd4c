"""How well a packing uses the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

from dapo_megatron.pack.cost import cost
from dapo_megatron.pack.microbatch import slots
from dapo_megatron.types import MicroBatch, MiniBatch, TrainSample


@dataclass(frozen=True, slots=True)
class PackStats:
    """Measures of one rollout step, all its mini-batches. Nothing to improve where the first three are 0."""

    waste: float
    """Part of all slots that are padding, from 0 to 1; micro-batches of nothing but padding count, too."""
    imbalance_tokens: float
    """Slots of the fullest rank over the mean of the ranks, less 1, in the worst update: uneven memory."""
    imbalance_cost: float
    """The same of `cost`, attention included: the part of its computing time by which the mean rank waits."""
    micro_batches: float
    """Micro-batches of each rank and mini-batch, the mean over mini-batches; ranks have the same number."""

    @classmethod
    def measured(
        cls, samples: Sequence[TrainSample], ranks: Sequence[Sequence[MiniBatch]], attention_tokens: float = math.inf
    ) -> PackStats:
        """Measure what `pack` made of `samples`; attention_tokens as given there."""
        if not samples:
            return cls(waste=0.0, imbalance_tokens=0.0, imbalance_cost=0.0, micro_batches=0.0)
        tokens = [[sum(batch.slots for batch in mini_batch.micro_batches) for mini_batch in rank] for rank in ranks]
        costs = [[sum(_cost(b, attention_tokens) for b in whole.micro_batches) for whole in rank] for rank in ranks]
        return cls(
            waste=1 - sum(slots(sample, 1) for sample in samples) / sum(map(sum, tokens)),
            imbalance_tokens=max(map(_imbalance, zip(*tokens, strict=True))),
            imbalance_cost=max(map(_imbalance, zip(*costs, strict=True))),
            micro_batches=mean(len(mini_batch.micro_batches) for mini_batch in ranks[0]),
        )


def _cost(batch: MicroBatch, attention_tokens: float) -> float:
    return sum(cost(end - start, attention_tokens) for start, end in pairwise(batch.cu_seqlens.tolist()))


def _imbalance(loads: Iterable[float]) -> float:
    """Of one mini-batch, a load for each rank."""
    loads = list(loads)
    return max(loads) * len(loads) / sum(loads) - 1
