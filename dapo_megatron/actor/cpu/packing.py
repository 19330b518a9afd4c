"""Plans how packed sequences go into the padded batches that CPU attention wants.

Under context parallel a rank holds the slots that `shard.slots_of` says: t of the T = n x t in the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dapo_megatron.actor.shard import slots_of


@dataclass(frozen=True)
class Bucket:
    """Sequences of about the same length, padded to the longest: one attention call."""

    sequences: int
    queries: int
    """Padded query slots of a sequence on this rank."""
    keys: int
    """Padded key slots of a sequence in the whole group."""
    mask: Tensor | None
    """bool [sequences, 1, queries, keys]: who sees whom; None where it is the plain causal triangle."""


@dataclass(frozen=True)
class Plan:
    """Where every slot goes."""

    positions_t: Tensor
    """int64 [t]: positions of this rank's slots in their sequences."""
    query_places_t: Tensor
    """int64 [t]: places of this rank's slots in the padded queries, all buckets end to end."""
    key_places_T: Tensor
    """int64 [T]: places of the group's slots, rank after rank, in the padded keys."""
    buckets: tuple[Bucket, ...]


_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()


def plan_of(cu_seqlens: Tensor, cp_size: int, cp_rank: int) -> Plan:
    """Return the plan for a micro-batch, made once for all its layers.

    Args:
        cu_seqlens: int32 [S+1] of the whole context-parallel group. The plan lives as long as this very tensor.
    """
    plan = _plans.get(cu_seqlens)
    if plan is None:
        plan = _plans[cu_seqlens] = _make_plan(cu_seqlens, cp_size, cp_rank)
    return plan


def _make_plan(cu_seqlens: Tensor, cp_size: int, cp_rank: int) -> Plan:
    device = cu_seqlens.device
    cu_seqlens = cu_seqlens.cpu()
    lengths = cu_seqlens.diff().long()
    local = lengths // cp_size
    slots_rt = [slots_of(cu_seqlens, cp_size, rank) for rank in range(cp_size)]
    positions_T = _counted(lengths)
    positions_t = positions_T[slots_rt[cp_rank]]
    query_starts, key_starts = torch.zeros_like(lengths), torch.zeros_like(lengths)
    buckets: list[Bucket] = []
    query_end = key_end = 0
    for members in _buckets(lengths.tolist()):
        count, keys, queries = len(members), int(lengths[members[0]]), int(local[members[0]])
        mask = None
        if cp_size > 1:
            visible = torch.zeros(count, queries, dtype=torch.int64)
            for row, member in zip(visible, members, strict=True):
                row[: local[member]] = positions_t.split(local.tolist())[member]
            mask = (torch.arange(keys) <= visible[..., None])[:, None].to(device)
        query_starts[members] = query_end + torch.arange(count) * queries
        key_starts[members] = key_end + torch.arange(count) * keys
        query_end += count * queries
        key_end += count * keys
        buckets.append(Bucket(count, queries, keys, mask))
    return Plan(
        positions_t=positions_t.to(device),
        query_places_t=(query_starts.repeat_interleave(local) + _counted(local)).to(device),
        key_places_T=(key_starts.repeat_interleave(lengths) + positions_T)[torch.cat(slots_rt)].to(device),
        buckets=tuple(buckets),
    )


def _counted(lengths: Tensor) -> Tensor:
    """Return 0, 1, 2, ... for each of these lengths, end to end."""
    return torch.cat([torch.arange(length) for length in lengths.tolist()])


def _buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Group indices so that no sequence is padded by more than a sixteenth, or 4 slots where that is more.

    Wider groups lose more to padding than they save in attention calls.
    """
    buckets: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[buckets[-1][0]] if buckets else None
        if longest is not None and longest - lengths[index] <= max(4, longest // 16):
            buckets[-1].append(index)
        else:
            buckets.append([index])
    return buckets
