"""How packed sequences lie in memory, and in the padded batches that CPU attention wants.

Under context parallel a sequence of L slots is cut into 2n chunks, and rank r of n holds chunks r and 2n-1-r (so that
every rank has the same share of the causal triangle). Sizes below: t slots on this rank, T = n x t in the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


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
    """int64 [t]: position in its sequence of each slot of this rank."""
    query_places_t: Tensor
    """int64 [t]: place of each slot of this rank in the padded queries, all buckets end to end."""
    key_places_T: Tensor
    """int64 [T]: place of each slot of the group, rank after rank, in the padded keys."""
    buckets: tuple[Bucket, ...]


_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()


def plan_of(cu_seqlens: Tensor, cp_size: int, cp_rank: int) -> Plan:
    """The plan for a micro-batch, made once for all its layers.

    Args:
        cu_seqlens: int32 [S+1] of the whole context-parallel group. The plan lives as long as this very tensor.
    """
    plan = _plans.get(cu_seqlens)
    if plan is None:
        plan = _plans[cu_seqlens] = _make_plan((cu_seqlens[1:] - cu_seqlens[:-1]).tolist(), cp_size, cp_rank)
    return plan


def _make_plan(lengths: list[int], cp_size: int, cp_rank: int) -> Plan:
    positions_rt = [
        torch.cat([_positions(length, cp_size, rank) for length in lengths]) if lengths else torch.empty(0).long()
        for rank in range(cp_size)
    ]
    query_starts, key_starts = [0] * len(lengths), [0] * len(lengths)
    buckets: list[Bucket] = []
    query_end = key_end = 0
    for members in _buckets(lengths):
        keys = lengths[members[0]]
        queries = keys // cp_size
        mask = None
        if cp_size > 1:
            visible = torch.zeros(len(members), queries, dtype=torch.int64)
            for row, member in enumerate(members):
                positions = _positions(lengths[member], cp_size, cp_rank)
                visible[row, : len(positions)] = positions
            mask = (torch.arange(keys) <= visible[..., None])[:, None]
        for row, member in enumerate(members):
            query_starts[member] = query_end + row * queries
            key_starts[member] = key_end + row * keys
        query_end += len(members) * queries
        key_end += len(members) * keys
        buckets.append(Bucket(len(members), queries, keys, mask))
    local = torch.tensor([length // cp_size for length in lengths])
    within = torch.cat([torch.arange(n) for n in local.tolist()]) if lengths else torch.empty(0).long()
    first_key = torch.tensor(key_starts).repeat_interleave(local)
    return Plan(
        positions_t=positions_rt[cp_rank],
        query_places_t=torch.tensor(query_starts).repeat_interleave(local) + within,
        key_places_T=torch.cat([first_key + positions_t for positions_t in positions_rt]),
        buckets=tuple(buckets),
    )


def _positions(length: int, cp_size: int, rank: int) -> Tensor:
    if cp_size == 1:
        return torch.arange(length)
    chunk = length // (2 * cp_size)
    last = 2 * cp_size - 1 - rank
    return torch.cat([torch.arange(rank * chunk, (rank + 1) * chunk), torch.arange(last * chunk, (last + 1) * chunk)])


def _buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Indices grouped so that no sequence is padded by more than a sixteenth, or 4 slots where that is more.

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
