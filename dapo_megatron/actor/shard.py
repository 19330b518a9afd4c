"""Cuts a rank's own part out of a micro-batch under context parallel, and leads back.

A sequence of L slots is cut into 2n chunks; rank r of n holds chunks r and 2n-1-r, as Megatron and Transformer Engine
want it, so that every rank has the same share of the causal triangle. Of its t = T/n slots, R are scored: those alone
go through the output layer and the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from dapo_megatron.errors import DapoError
from dapo_megatron.types import MicroBatch


class LayoutError(DapoError, RuntimeError):
    """A micro-batch whose sizes do not divide the way the layout needs."""


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank computes of one micro-batch."""

    tokens_t: Tensor
    """int64 [t]: the tokens of this rank's slots."""
    positions_t: Tensor
    """int64 [t]: their positions."""
    packed: PackedSeqParams
    """Megatron's description of the sequences of the whole context-parallel group."""
    rows_R: Tensor
    """int64 [R], R > 0: which of the t slots are scored; where none is, the first, so that there is a backward pass."""
    batch: MicroBatch
    """The scored slots alone, T = R; its cu_seqlens count them."""

    def spread(self, values_R: Tensor) -> Tensor:
        """Return [t]: `values_R` where they belong, 0 on the slots that are not scored."""
        values_R = torch.where(self.batch.scored_T, values_R, 0)
        return values_R.new_zeros(self.tokens_t.shape).index_copy(0, self.rows_R, values_R)


def make_shard(
    batch: MicroBatch, *, cp: int, cp_rank: int, sequence_parallel_ranks: int, device: torch.device
) -> Shard:
    """Cut a micro-batch of the whole context-parallel group and move the part to `device`.

    Args:
        sequence_parallel_ranks: tensor-parallel ranks that split the slots further; 1 without sequence parallel.

    Raises:
        LayoutError: where a sequence is no multiple of 2 x cp slots, or the part does not split over the ranks.
    """
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
    odd = [length for length in lengths if cp > 1 and length % (2 * cp)]
    if odd:
        raise LayoutError(
            f"context parallel cuts a sequence into 2 x cp({cp}) = {2 * cp} equal chunks, but one has {odd[0]} slots; "
            f"pad every sequence to a multiple of {2 * cp}"
        )
    if batch.slots // cp % sequence_parallel_ranks:
        raise LayoutError(
            f"sequence parallel splits slots({batch.slots}) / cp({cp}) = {batch.slots // cp} over "
            f"tp({sequence_parallel_ranks}); pad the micro-batch to a multiple of {cp * sequence_parallel_ranks}"
        )
    cu_seqlens = batch.cu_seqlens.to(device)
    longest = max(lengths, default=0)
    # Only context parallel wants these. Where they differ from the others, fast kernels are lost; where Transformer
    # Engine has to compare them, the host waits for the GPU.
    padded: Any = cu_seqlens if cp > 1 else None
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    mine = slots_of(batch.cu_seqlens, cp, cp_rank)
    scored_t = batch.scored_T[mine]
    rows_R = scored_t.nonzero()[:, 0] if scored_t.any() else torch.zeros(1, dtype=torch.int64)
    slots_R = mine[rows_R]

    def scored(x_T: Tensor | None) -> Tensor | None:
        return None if x_T is None else x_T[slots_R].to(device)

    fields = {name: scored(getattr(batch, name)) for name in MicroBatch.__dataclass_fields__ if name.endswith("_T")}
    bounds = torch.searchsorted(rows_R, batch.cu_seqlens // cp).to(device=device, dtype=torch.int32)
    return Shard(
        tokens_t=batch.tokens_T[mine].to(device),
        positions_t=batch.positions_T[mine].to(device),
        packed=packed,
        rows_R=rows_R.to(device),
        batch=replace(batch, cu_seqlens=bounds, **fields),
    )


def runs_of(batches: Sequence[MicroBatch], limit: int | None) -> list[list[MicroBatch]]:
    """Group consecutive micro-batches of up to `limit` slots together; each is by itself where it is None."""
    parts: list[list[MicroBatch]] = []
    room = 0
    for batch in batches:
        if limit is None or batch.slots > room:
            parts.append([])
            room = limit or 0
        parts[-1].append(batch)
        room -= batch.slots
    return parts


def concatenated(batches: Sequence[MicroBatch]) -> MicroBatch:
    """Return one micro-batch with the sequences of all of them."""
    if len(batches) == 1:
        return batches[0]

    def column(name: str) -> Tensor | None:
        values = [getattr(batch, name) for batch in batches]
        return None if values[0] is None else torch.cat(values)

    starts = accumulate((batch.slots for batch in batches), initial=0)
    bounds = [batch.cu_seqlens[1:] + start for batch, start in zip(batches, starts, strict=False)]
    columns: dict[str, Any] = {name: column(name) for name in MicroBatch.__dataclass_fields__ if name != "cu_seqlens"}
    return MicroBatch(cu_seqlens=torch.cat([batches[0].cu_seqlens[:1], *bounds]), **columns)


def slots_of(cu_seqlens: Tensor, cp: int, cp_rank: int) -> Tensor:
    """Return the slots of a micro-batch that this rank holds, in its order: int64 [T / cp]."""
    if cp == 1:
        return torch.arange(int(cu_seqlens[-1]))
    slots = []
    for start, end in pairwise(cu_seqlens.tolist()):
        chunks = torch.arange(start, end).chunk(2 * cp)
        slots += [chunks[cp_rank], chunks[2 * cp - 1 - cp_rank]]
    return torch.cat(slots)
