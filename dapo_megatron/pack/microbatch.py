"""Builds one micro-batch from the sequences of one bin."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from dapo_megatron.types import MicroBatch, TrainSample

_NOTHING = TrainSample(
    token_ids=torch.zeros(1, dtype=torch.int32),
    loss_mask=torch.zeros(1, dtype=torch.bool),
    rollout_logprobs=torch.zeros(1),
    advantage=0.0,
    group=-1,
)
"""A sample that predicts no token: a micro-batch without sequences is its padding."""


def round_up(size: int, multiple: int) -> int:
    """Return the smallest multiple that holds `size`."""
    return -(-size // multiple) * multiple


def slots(length: int, sequence_multiple: int) -> int:
    """Return how many slots a sequence of `length` tokens fills: one per predicted token, padded to the multiple."""
    return round_up(max(length - 1, 0), sequence_multiple)


def widths(lengths: Sequence[int], sequence_multiple: int, total_multiple: int) -> list[int]:
    """Return the slots of each segment of a micro-batch of sequences of these many tokens, as `build` lays them.

    Sequences of one token are left out; without others there is one segment of padding.
    """
    found = [slots(length, sequence_multiple) for length in lengths if length > 1] or [0]
    found[-1] += round_up(max(sum(found), 1), sequence_multiple * total_multiple) - sum(found)
    return found


def build(samples: Sequence[TrainSample], *, sequence_multiple: int, total_multiple: int) -> MicroBatch:
    """Lay `samples` end to end, each padded to `sequence_multiple` slots, the last one so that T divides as well.

    T is a multiple of sequence_multiple x total_multiple. Samples of one token predict nothing and are left out;
    without others the result is one segment of padding. Padding has token 0, label 0 and no loss; it comes after the
    tokens it belongs to, so causal attention hides it. Weights are 1 on loss tokens, whatever the scope of the loss.
    """
    kept = [sample for sample in samples if sample.length > 1] or [_NOTHING]
    sizes = widths([sample.length for sample in kept], sequence_multiple, total_multiple)
    gaps = [width - sample.length + 1 for width, sample in zip(sizes, kept, strict=True)]

    def lay(parts: Sequence[Tensor]) -> Tensor:
        rows = []
        for part, gap in zip(parts, gaps, strict=True):
            rows.append(part)
            if gap:
                rows.append(part.new_zeros(gap))
        return torch.cat(rows)

    loss_mask_T = lay([sample.loss_mask[1:] for sample in kept])
    first_slots = torch.arange(max(sizes))
    advantages_T = torch.empty(sum(sizes))
    for part, sample in zip(advantages_T.split(sizes), kept, strict=True):
        part.fill_(sample.advantage)
    return MicroBatch(
        tokens_T=lay([sample.token_ids[:-1] for sample in kept]).long(),
        labels_T=lay([sample.token_ids[1:] for sample in kept]).long(),
        positions_T=torch.cat([first_slots[:width] for width in sizes]),
        cu_seqlens=torch.tensor(list(accumulate(sizes, initial=0)), dtype=torch.int32),
        scored_T=loss_mask_T.clone(),
        loss_mask_T=loss_mask_T,
        advantages_T=advantages_T,
        weights_T=loss_mask_T.float(),
        rollout_logprobs_T=lay([sample.rollout_logprobs[1:] for sample in kept]),
        groups_S=torch.tensor([sample.group for sample in kept]),
    )
