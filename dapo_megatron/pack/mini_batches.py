"""Decides which samples of a rollout go into which micro-batch of which replica."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from dapo_megatron.errors import DapoError
from dapo_megatron.pack.bins import Bin, partition
from dapo_megatron.pack.cost import cost
from dapo_megatron.pack.microbatch import slots
from dapo_megatron.pack.share import Share
from dapo_megatron.types import TrainSample


@dataclass(frozen=True, slots=True)
class Packed:
    """Which samples of a step go where."""

    samples: Sequence[TrainSample]
    replicas: Sequence[Sequence[Sequence[Bin]]]
    """replicas[replica][mini-batch][micro-batch]: indices into the samples, every one once. Each replica has as many
    micro-batches."""
    loss_tokens: Sequence[int]
    """Of each mini-batch, all replicas together."""
    sequence_multiple: int
    total_multiple: int

    def share(self, replica: int) -> Share:
        """Copy what one replica trains on out of the samples."""
        rows = [[[self.samples[index] for index in bin_] for bin_ in bins] for bins in self.replicas[replica]]
        return Share.of(rows, self.loss_tokens)


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
) -> Packed:
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

    Raises:
        DapoError: for a sample that does not fit into a micro-batch by itself.
    """
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    unit = sequence_multiple * total_multiple
    capacity = micro_batch_tokens // unit * unit
    packed: list[list[list[Bin]]] = [[] for _ in range(replicas)]
    loss_tokens = []
    for numbers in _split(order, mini_batch):
        batch = [samples[number] for number in numbers]
        loss_tokens.append(sum(sample.loss_tokens for sample in batch))
        sizes = [slots(sample.length, sequence_multiple) for sample in batch]
        _assert_fits(batch, sizes, capacity, micro_batch_tokens, unit)
        costs = [cost(size, attention_tokens) for size in sizes]
        dealt = partition(sizes, costs, capacity=capacity, replicas=replicas, multiple=micro_batch_multiple)
        for mini_batches, bins in zip(packed, dealt, strict=True):
            mini_batches.append([[numbers[index] for index in bin_] for bin_ in bins])
    return Packed(samples, packed, loss_tokens, sequence_multiple, total_multiple)


def _split(order: Sequence[int], size: int) -> list[Sequence[int]]:
    """Return parts of at most `size` numbers, as few as possible, as equal as possible."""
    count = -(-len(order) // size)
    return [order[len(order) * part // count : len(order) * (part + 1) // count] for part in range(count)]


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
