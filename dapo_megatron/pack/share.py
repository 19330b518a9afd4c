"""What a replica trains on in one step, as flat tensors that travel, and the mini-batches made of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from dapo_megatron.pack.microbatch import build
from dapo_megatron.types import MiniBatch, TrainSample


class Share(NamedTuple):
    """The samples of one replica, end to end in the order of its micro-batches: 9 bytes a token.

    N tokens, R samples, M micro-batches, U mini-batches (updates).

    >>> share = Share(
    ...     token_ids=torch.tensor([7, 10, 2, 5, 2], dtype=torch.int32),              # prompt 7, response 10, 2; ...
    ...     loss_mask=torch.tensor([False, True, True, False, True]),
    ...     rollout_logprobs=torch.tensor([0.0, -0.11, -0.01, 0.0, -0.3]),
    ...     lengths=torch.tensor([3, 2]), advantages=torch.tensor([0.7, -0.7]), groups=torch.tensor([0, 0]),
    ...     sample_counts=torch.tensor([2]), micro_batch_counts=torch.tensor([1]), loss_tokens=torch.tensor([3]))
    >>> ((micro_batch,),) = (whole.micro_batches for whole in share.mini_batches())
    >>> micro_batch.labels_T.tolist(), micro_batch.cu_seqlens.tolist()
    ([10, 2, 2], [0, 2, 3])
    """

    token_ids: Tensor
    """int32 [N]: see `TrainSample`, as for the next two."""
    loss_mask: Tensor
    """bool [N]."""
    rollout_logprobs: Tensor
    """float32 [N], nats."""
    lengths: Tensor
    """int64 [R]: tokens of each sample."""
    advantages: Tensor
    """float32 [R]."""
    groups: Tensor
    """int64 [R]."""
    sample_counts: Tensor
    """int64 [M]: samples of each micro-batch, 0 for one of nothing but padding."""
    micro_batch_counts: Tensor
    """int64 [U]: micro-batches of each mini-batch."""
    loss_tokens: Tensor
    """int64 [U]: `MiniBatch.loss_tokens`, which counts all replicas."""

    @classmethod
    def of(cls, mini_batches: Sequence[Sequence[Sequence[TrainSample]]], loss_tokens: Sequence[int]) -> Share:
        """Lay the samples end to end.

        Args:
            mini_batches: the samples of mini_batches[mini-batch][micro-batch].
            loss_tokens: of each mini-batch.
        """
        rows = [row for micro_batches in mini_batches for row in micro_batches]
        samples = [sample for row in rows for sample in row]
        return cls(
            token_ids=_flat([sample.token_ids for sample in samples], torch.int32),
            loss_mask=_flat([sample.loss_mask for sample in samples], torch.bool),
            rollout_logprobs=_flat([sample.rollout_logprobs for sample in samples], torch.float32),
            lengths=torch.tensor([sample.length for sample in samples], dtype=torch.int64),
            advantages=torch.tensor([sample.advantage for sample in samples], dtype=torch.float32),
            groups=torch.tensor([sample.group for sample in samples], dtype=torch.int64),
            sample_counts=torch.tensor([len(row) for row in rows], dtype=torch.int64),
            micro_batch_counts=torch.tensor([len(micro_batches) for micro_batches in mini_batches], dtype=torch.int64),
            loss_tokens=torch.tensor(loss_tokens, dtype=torch.int64),
        )

    def mini_batches(self, *, sequence_multiple: int = 1, total_multiple: int = 1) -> list[MiniBatch]:
        """Make the mini-batches, padded by `microbatch.build`; the multiples are those that it was packed with."""
        samples = iter(self._samples())
        micro_batches = (
            build(list(islice(samples, count)), sequence_multiple=sequence_multiple, total_multiple=total_multiple)
            for count in self.sample_counts.tolist()
        )
        return [
            MiniBatch(tuple(islice(micro_batches, count)), loss_tokens)
            for count, loss_tokens in zip(self.micro_batch_counts.tolist(), self.loss_tokens.tolist(), strict=True)
        ]

    def _samples(self) -> list[TrainSample]:
        lengths = self.lengths.tolist()
        columns = (column.split(lengths) for column in (self.token_ids, self.loss_mask, self.rollout_logprobs))
        return list(map(TrainSample, *columns, self.advantages.tolist(), self.groups.tolist()))


def _flat(rows: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Join rows; none at all have their type too, for receivers go by it."""
    return torch.cat(rows).to(dtype) if rows else torch.empty(0, dtype=dtype)
