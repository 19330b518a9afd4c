"""Builds one micro-batch from the sequences of one bin."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from dapo_megatron.types import MicroBatch, TrainSample


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def slots(sample: TrainSample, sequence_multiple: int) -> int:
    """Slots a sample fills: one per predicted token, padded to the multiple."""
    return round_up(max(sample.length - 1, 0), sequence_multiple)


def build(
    samples: Sequence[TrainSample], weights: Sequence[float], *, sequence_multiple: int, total_multiple: int
) -> MicroBatch:
    """Lay `samples` end to end, each padded to `sequence_multiple` slots, the last one so that T divides as well.

    T is a multiple of sequence_multiple x total_multiple. Without samples the result is one segment of padding.
    Padding has token 0, label 0 and no loss; it comes after the tokens it belongs to, so causal attention hides it.
    """
    filled = [(sample, weight) for sample, weight in zip(samples, weights, strict=True) if sample.length > 1]
    widths = [slots(sample, sequence_multiple) for sample, _ in filled]
    total = round_up(max(sum(widths), 1), sequence_multiple * total_multiple)
    widths = [*widths[:-1], total - sum(widths[:-1])]
    ends = list(accumulate(widths, initial=0))

    tokens_T = torch.zeros(total, dtype=torch.int64)
    labels_T = torch.zeros(total, dtype=torch.int64)
    positions_T = torch.zeros(total, dtype=torch.int64)
    loss_mask_T = torch.zeros(total, dtype=torch.bool)
    advantages_T = torch.zeros(total)
    weights_T = torch.zeros(total)
    rollout_logprobs_T = torch.zeros(total)
    for start, end in pairwise(ends):
        positions_T[start:end] = torch.arange(end - start)
    for (sample, weight), start in zip(filled, ends, strict=False):
        here = slice(start, start + sample.length - 1)
        tokens_T[here] = sample.token_ids[:-1]
        labels_T[here] = sample.token_ids[1:]
        loss_mask_T[here] = sample.loss_mask[1:]
        advantages_T[here] = sample.advantage
        weights_T[here] = weight
        rollout_logprobs_T[here] = sample.rollout_logprobs[1:]
    return MicroBatch(
        tokens_T=tokens_T,
        labels_T=labels_T,
        positions_T=positions_T,
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        loss_mask_T=loss_mask_T,
        advantages_T=advantages_T,
        weights_T=weights_T,
        rollout_logprobs_T=rollout_logprobs_T,
    )
