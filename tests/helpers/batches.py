"""Random packed micro-batches, and the same numbers from a plain Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dapo_megatron.measures import Max, Mean
from dapo_megatron.types import MicroBatch, MiniBatch, TokenLoss


def make_micro_batch(
    lengths: Sequence[int], *, seed: int, vocab_size: int = 50, multiple: int = 1, masked: bool = False
) -> MicroBatch:
    """Makes sequences of these many slots, each padded to a multiple; about 70% loss tokens, or none where `masked`."""
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list[Tensor]] = {name: [] for name in ("tokens", "labels", "positions", "mask", "advantages")}
    bounds = [0]
    for length in lengths:
        padding = -length % multiple
        ids = torch.randint(vocab_size, (length + 1,), generator=generator)
        mask = (torch.rand(length, generator=generator) < 0.7) & (not masked)
        advantage = torch.randn((), generator=generator)
        rows["tokens"].append(torch.nn.functional.pad(ids[:-1], (0, padding)))
        rows["labels"].append(torch.nn.functional.pad(ids[1:], (0, padding)))
        rows["mask"].append(torch.nn.functional.pad(mask, (0, padding)))
        rows["positions"].append(torch.arange(length + padding))
        rows["advantages"].append(advantage.expand(length + padding))
        bounds.append(bounds[-1] + length + padding)
    columns = {name: torch.cat(parts) for name, parts in rows.items()}
    return MicroBatch(
        tokens_T=columns["tokens"],
        labels_T=columns["labels"],
        positions_T=columns["positions"],
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        scored_T=columns["mask"],
        loss_mask_T=columns["mask"],
        advantages_T=columns["advantages"],
        weights_T=torch.ones(bounds[-1]),
        rollout_logprobs_T=torch.zeros(bounds[-1]),
        groups_S=torch.arange(len(lengths)),
    )


def ratio_loss(logprobs_T: Tensor, batch: MicroBatch, *_: Any) -> TokenLoss:
    """Unclipped policy gradient on the ratio to old_logprobs_T: smooth, so that float32 and float64 agree."""
    assert batch.old_logprobs_T is not None
    ratio_T = (logprobs_T - batch.old_logprobs_T).exp()
    mask_T = batch.loss_mask_T
    highest = ratio_T.detach().masked_fill(~mask_T, 0.0).amax()
    return TokenLoss(
        loss_sum=-(ratio_T * batch.advantages_T * mask_T).sum(),
        loss_tokens=mask_T.sum(),
        measures={"ratio/mean": Mean((ratio_T.detach() * mask_T).sum(), mask_T.sum()), "ratio/max": Max(highest)},
    )


def reference_logprobs(model: Any, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
    """Computes log-probs [T] with a Hugging Face model, sequence by sequence, each alone."""
    pieces = []
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        logits = model(batch.tokens_T[None, start:end]).logits[0] / temperature
        pieces.append(torch.log_softmax(logits, -1).gather(-1, batch.labels_T[start:end, None])[:, 0])
    return torch.cat(pieces)


def make_mini_batch(batches: Sequence[MicroBatch], loss_tokens: int | None = None) -> MiniBatch:
    """A mini-batch of one replica; with several replicas, give the count of all."""
    own = sum(batch.loss_tokens for batch in batches)
    return MiniBatch(tuple(batches), own if loss_tokens is None else loss_tokens)


def worst_relative_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Returns the largest difference of two sets of tensors, each relative to its tensor's largest entry."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    return max(float((got[name].double() - want[name]).abs().max() / want[name].abs().max()) for name in want)
