"""Turns the samples of a rollout into the mini-batches of every replica."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from dapo_megatron.errors import DapoError
from dapo_megatron.pack.bins import partition
from dapo_megatron.pack.cost import cost
from dapo_megatron.pack.microbatch import build, slots
from dapo_megatron.types import MiniBatch, TrainSample


def pack(
    samples: Sequence[TrainSample],
    *,
    mini_batch: int,
    micro_batch_tokens: int,
    replicas: int,
    seed: int | str,
    sequence_multiple: int = 1,
    total_multiple: int = 1,
    micro_batch_multiple: int = 1,
    attention_tokens: float = math.inf,
) -> list[list[MiniBatch]]:
    """Shuffle `samples` with `seed`, split them into mini-batches, and balance each over replicas by what it costs.

    Ranks wait for each other once per mini-batch, so what is balanced is each replica's total `cost`; within a replica,
    micro-batches are balanced by tokens. Mini-batches differ by one response at the most: where `mini_batch` does not
    divide their number, all are a little smaller. A micro-batch that gets no sequence becomes one segment of padding
    without loss, because replicas step together.

    Args:
        mini_batch: responses per update.
        micro_batch_tokens: slots of a micro-batch at the most, padding included.
        seed: seed of the shuffle; give each step its own, for example f"{seed}:{step}".
        sequence_multiple: slots of every segment are a multiple of this (context parallel: twice its size).
        total_multiple: T is a multiple of sequence_multiple times this (sequence parallel: the tensor-parallel size),
            so each context-parallel share of T divides by it, too.
        micro_batch_multiple: micro-batches of a mini-batch are a multiple of this (interleaved pipeline schedule).
        attention_tokens: length at which attention costs as much as the rest of the model, see `cost`; math.inf
            balances tokens alone.

    Returns:
        result[replica][mini-batch], with as many micro-batches for every replica. Weights are 1 on loss tokens.

    Raises:
        DapoError: for a sample that does not fit into a micro-batch by itself.
    """
    shuffled = list(samples)
    random.Random(seed).shuffle(shuffled)
    unit = sequence_multiple * total_multiple
    capacity = micro_batch_tokens // unit * unit
    packed: list[list[MiniBatch]] = [[] for _ in range(replicas)]
    for batch in _split(shuffled, mini_batch):
        loss_tokens = sum(sample.loss_tokens for sample in batch)
        sizes = [slots(sample, sequence_multiple) for sample in batch]
        _assert_fits(batch, sizes, capacity, micro_batch_tokens, unit)
        costs = [cost(size, attention_tokens) for size in sizes]
        dealt = partition(sizes, costs, capacity=capacity, replicas=replicas, multiple=micro_batch_multiple)
        for mini_batches, bins in zip(packed, dealt, strict=True):
            micro_batches = tuple(
                build(
                    [batch[index] for index in bin_], sequence_multiple=sequence_multiple, total_multiple=total_multiple
                )
                for bin_ in bins
            )
            mini_batches.append(MiniBatch(micro_batches, loss_tokens))
    return packed


def _split(samples: Sequence[TrainSample], size: int) -> list[Sequence[TrainSample]]:
    """Return parts of at most `size` samples, as few as possible, as equal as possible."""
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
