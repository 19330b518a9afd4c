"""Builds one micro-batch from the sequences of one bin."""

from __future__ import annotations

from collections.abc import Sequence

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
    widths_S = torch.tensor(widths)
    ends_S = widths_S.cumsum(0)
    starts_S = ends_S - widths_S

    tokens_T = torch.zeros(total, dtype=torch.int64)
    labels_T = torch.zeros(total, dtype=torch.int64)
    loss_mask_T = torch.zeros(total, dtype=torch.bool)
    rollout_logprobs_T = torch.zeros(total)
    for (sample, _), start in zip(filled, starts_S.tolist(), strict=False):
        here = slice(start, start + sample.length - 1)
        tokens_T[here] = sample.token_ids[:-1]
        labels_T[here] = sample.token_ids[1:]
        loss_mask_T[here] = sample.loss_mask[1:]
        rollout_logprobs_T[here] = sample.rollout_logprobs[1:]
    advantages_S = torch.tensor([sample.advantage for sample, _ in filled] or [0.0], dtype=torch.float32)
    weights_S = torch.tensor([weight for _, weight in filled] or [0.0], dtype=torch.float32)
    return MicroBatch(
        tokens_T=tokens_T,
        labels_T=labels_T,
        positions_T=torch.arange(total) - starts_S.repeat_interleave(widths_S),
        cu_seqlens=torch.cat([torch.zeros(1), ends_S]).to(torch.int32),
        loss_mask_T=loss_mask_T,
        advantages_T=advantages_S.repeat_interleave(widths_S),
        weights_T=weights_S.repeat_interleave(widths_S),
        rollout_logprobs_T=rollout_logprobs_T,
    )
