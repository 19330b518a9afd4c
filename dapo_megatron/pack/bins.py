"""Distributes sequences over equally many bins per rank. Plain integers; knows nothing of samples."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

Bin = list[int]
"""Indices into the sizes."""


def partition(sizes: Sequence[int], *, capacity: int, ranks: int) -> list[list[Bin]]:
    """result[rank][micro-batch]: every index once, no bin above `capacity`, as many bins on every rank.

    That number is what best-fit decreasing needs (at most 11/9 of the best possible, plus one bin). The items then go
    one by one to the emptiest of that many bins, which balances them; only where this does not fit does the tighter
    packing stay. Bins can be empty. Every size must be at most `capacity`. The result depends on the arguments alone.
    """
    assert max(sizes, default=0) <= capacity, f"size {max(sizes)} is above the capacity {capacity}"
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    tight = _best_fit(order, sizes, capacity)
    count = max(1, -(-len(tight) // ranks)) * ranks
    bins = _level(order, sizes, count, capacity) or tight + [[] for _ in range(count - len(tight))]
    return _deal(bins, sizes, ranks)


def _best_fit(order: Sequence[int], sizes: Sequence[int], capacity: int) -> list[Bin]:
    """Each to the fullest bin with room, or to a new one."""
    bins: list[Bin] = []
    rooms: list[tuple[int, int]] = []
    for index in order:
        found = bisect_left(rooms, (sizes[index], -1))
        if found == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = rooms.pop(found)
        insort(rooms, (room - sizes[index], number))
        bins[number].append(index)
    return bins


def _level(order: Sequence[int], sizes: Sequence[int], count: int, capacity: int) -> list[Bin] | None:
    """Each to the emptiest of `count` bins; None where one overflows."""
    bins: list[Bin] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for index in order:
        load, number = loads[0]
        if load + sizes[index] > capacity:
            return None
        heapq.heapreplace(loads, (load + sizes[index], number))
        bins[number].append(index)
    return bins


def _deal(bins: list[Bin], sizes: Sequence[int], ranks: int) -> list[list[Bin]]:
    """Bins of like size run at the same time on different ranks; the rank with the least so far gets the largest."""
    loads = [sum(sizes[index] for index in bin_) for bin_ in bins]
    by_load = sorted(range(len(bins)), key=lambda number: (-loads[number], number))
    totals = [0] * ranks
    dealt: list[list[Bin]] = [[] for _ in range(ranks)]
    for first in range(0, len(by_load), ranks):
        emptiest = sorted(range(ranks), key=lambda rank: (totals[rank], rank))
        for rank, number in zip(emptiest, by_load[first : first + ranks], strict=True):
            dealt[rank].append(bins[number])
            totals[rank] += loads[number]
    return dealt
