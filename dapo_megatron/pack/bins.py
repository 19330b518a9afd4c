"""Distributes sequences over ranks and their micro-batches. Plain numbers; knows nothing of samples."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

Bin = list[int]
"""Indices into the sizes."""


def partition(
    sizes: Sequence[int], costs: Sequence[float], *, capacity: int, ranks: int, multiple: int = 1
) -> list[list[Bin]]:
    """result[rank][micro-batch]: every index once, no bin above `capacity`, as many bins on every rank.

    There are as many bins as best-fit decreasing needs, regardless of ranks: at most 11/9 of the best possible, plus
    one. Items go largest first to the rank with the least cost so far (longest processing time first, Graham 1969), and
    there to the emptiest bin; where that does not fit, to the fullest bin with room; where that does not fit either,
    the bins of best-fit are dealt out whole.

    Args:
        sizes: each at most `capacity`, which bounds their sum in a bin.
        costs: the time of each, which ranks share evenly; grows with the size.
        multiple: the number of bins of a rank is a multiple of this.

    Returns:
        Bins, possibly empty, the fullest of a rank first. Depends on the arguments alone.
    """
    assert max(sizes, default=0) <= capacity, f"size {max(sizes)} is above the capacity {capacity}"
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    tight = _best_fit(order, sizes, capacity)
    shape = ranks, max(1, -(-len(tight) // (ranks * multiple))) * multiple
    dealt = (
        _fill(order, sizes, costs, capacity, shape)
        or _fill(order, sizes, costs, capacity, shape, tight=True)
        or _deal(tight, costs, shape)
    )
    return [sorted(rank, key=lambda bin_: -sum(sizes[index] for index in bin_)) for rank in dealt]


def _best_fit(order: Sequence[int], sizes: Sequence[int], capacity: int) -> list[Bin]:
    """Each to the fullest bin with room, or to a new one."""
    bins: list[Bin] = []
    rooms: list[tuple[int, int]] = []
    for index in order:
        found = bisect_left(rooms, (sizes[index], 0))
        if found == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = rooms.pop(found)
        insort(rooms, (room - sizes[index], number))
        bins[number].append(index)
    return bins


def _fill(
    order: Sequence[int],
    sizes: Sequence[int],
    costs: Sequence[float],
    capacity: int,
    shape: tuple[int, int],
    *,
    tight: bool = False,
) -> list[list[Bin]] | None:
    """Each to the cheapest rank with room, and there to the emptiest bin, or to the fullest with room where `tight`.

    `shape` is ranks and bins of each. None where one fits nowhere.
    """
    ranks, count = shape
    filled: list[list[Bin]] = [[[] for _ in range(count)] for _ in range(ranks)]
    rooms = [[(capacity, number) for number in range(count)] for _ in range(ranks)]  # of each rank, ascending
    queue = [(0.0, rank) for rank in range(ranks)]  # a heap, the cheapest first
    for index in order:
        size, full = sizes[index], []
        while queue and rooms[queue[0][1]][-1][0] < size:
            full.append(heapq.heappop(queue))
        if not queue:
            return None
        cost, rank = queue[0]
        heapq.heapreplace(queue, (cost + costs[index], rank))
        room, number = rooms[rank].pop(bisect_left(rooms[rank], (size, 0)) if tight else -1)
        insort(rooms[rank], (room - size, number))
        filled[rank][number].append(index)
        for entry in full:
            heapq.heappush(queue, entry)
    return filled


def _deal(bins: Sequence[Bin], costs: Sequence[float], shape: tuple[int, int]) -> list[list[Bin]]:
    """Each bin, the costliest first, to the cheapest rank with a place for one more."""
    totals = [sum(costs[index] for index in bin_) for bin_ in bins]
    order = sorted(range(len(bins)), key=lambda number: (-totals[number], number))
    dealt = _fill(order, [1] * len(bins), totals, 1, shape)
    assert dealt, f"{len(bins)} bins for {shape[0]} x {shape[1]} places"
    return [[[index for number in place for index in bins[number]] for place in rank] for rank in dealt]
