"""Turns the samples of a rollout into the updates of every data-parallel rank."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from dapo_megatron.errors import DapoError
from dapo_megatron.pack.bins import partition
from dapo_megatron.pack.microbatch import build, slots
from dapo_megatron.pack.weights import Scope, token_weights
from dapo_megatron.types import TrainSample, Update


def pack(
    samples: Sequence[TrainSample],
    *,
    mini_batch: int,
    micro_batch_tokens: int,
    data_parallel: int,
    scope: Scope,
    seed: int,
    sequence_multiple: int = 1,
    total_multiple: int = 1,
) -> list[list[Update]]:
    """Shuffle `samples` with `seed`, split them into mini-batches, and balance each by tokens over ranks and bins.

    Mini-batches differ by one response at the most: where `mini_batch` does not divide their number, all are a little
    smaller. A bin that gets no sequence becomes one segment of padding without loss, because ranks step together.

    Args:
        mini_batch: responses per optimizer step.
        micro_batch_tokens: slots of a micro-batch at the most, padding included.
        sequence_multiple: slots of every segment are a multiple of this (context parallel: twice its size).
        total_multiple: T is a multiple of sequence_multiple times this (sequence parallel: the tensor-parallel size),
            so each context-parallel share of T divides by it, too.

    Returns:
        result[rank][update]; for one update, as many micro-batches on every rank.

    Raises:
        DapoError: for a sample that does not fit into a micro-batch by itself.
    """
    shuffled = list(samples)
    random.Random(seed).shuffle(shuffled)
    unit = sequence_multiple * total_multiple
    capacity = micro_batch_tokens // unit * unit
    ranks: list[list[Update]] = [[] for _ in range(data_parallel)]
    for batch in _split(shuffled, mini_batch):
        loss_tokens = sum(sample.loss_tokens for sample in batch)
        weights = token_weights(batch, scope)
        sizes = [slots(sample, sequence_multiple) for sample in batch]
        _assert_fits(batch, sizes, capacity, micro_batch_tokens, unit)
        for updates, bins in zip(ranks, partition(sizes, capacity=capacity, ranks=data_parallel), strict=True):
            micro_batches = tuple(
                build(
                    [batch[index] for index in bin_],
                    [weights[index] for index in bin_],
                    sequence_multiple=sequence_multiple,
                    total_multiple=total_multiple,
                )
                for bin_ in bins
            )
            updates.append(Update(micro_batches, loss_tokens))
    return ranks


@dataclass(frozen=True, slots=True)
class PackStats:
    """How well a packing uses the ranks.

    >>> PackStats(waste=0.004, imbalance=0.01)  # doctest: +SKIP
    """

    waste: float
    """Part of the slots that are padding."""
    imbalance: float
    """Slots of the fullest rank over the mean of the ranks, less 1, in the worst update: time that others wait."""

    @classmethod
    def of(cls, samples: Sequence[TrainSample], ranks: Sequence[Sequence[Update]]) -> PackStats:
        """Measure what `pack` made of `samples`."""
        used = sum(slots(sample, 1) for sample in samples)
        loads = [[sum(batch.tokens for batch in update.micro_batches) for update in updates] for updates in ranks]
        total = sum(map(sum, loads))
        if not total:
            return cls(waste=0.0, imbalance=0.0)
        return cls(
            waste=1 - used / total,
            imbalance=max(max(load) * len(load) / sum(load) for load in zip(*loads, strict=True)) - 1,
        )


def _split(samples: Sequence[TrainSample], size: int) -> list[Sequence[TrainSample]]:
    """Parts of at most `size`, as few as possible, as equal as possible."""
    count = -(-len(samples) // size)
    return [samples[len(samples) * part // count : len(samples) * (part + 1) // count] for part in range(count)]


def _assert_fits(
    batch: Sequence[TrainSample], sizes: Sequence[int], capacity: int, micro_batch_tokens: int, unit: int
) -> None:
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    if sizes[largest] > capacity:
        raise DapoError(
            f"a sequence of {batch[largest].length} tokens fills {sizes[largest]} slots, more than a micro-batch of "
            f"train.micro_batch_tokens({micro_batch_tokens}) rounded down to a multiple of {unit} = {capacity}; "
            f"raise train.micro_batch_tokens or shorten data.max_prompt_tokens or rollout.max_response_tokens"
        )
