"""Distributes sequences, of which it knows only the sizes, over replicas and their micro-batches."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

Bin = list[int]
"""Indices into the sizes."""


def partition(
    sizes: Sequence[int], costs: Sequence[float], *, capacity: int, replicas: int, multiple: int = 1
) -> list[list[Bin]]:
    """Return result[replica][bin]: every index once, no bin above `capacity`, as many bins for every replica.

    There are as many bins as best-fit decreasing needs, regardless of replicas: at most 11/9 of the best possible, plus
    one. Sequences go largest first to the replica with the least cost so far (longest processing time first, Graham
    1969), and there to the emptiest bin; where that does not fit, to the fullest bin with room; where that does not fit
    either, the bins of best-fit are dealt out whole.

    Args:
        sizes: of the sequences, each at most `capacity`, which bounds their sum in a bin.
        costs: the time that each sequence takes, shared evenly by replicas; it grows with the size.
        multiple: the number of bins of a replica is a multiple of this.

    Returns:
        Bins, possibly empty, the fullest of a replica first. The result depends on the arguments alone.
    """
    assert max(sizes, default=0) <= capacity, f"size {max(sizes)} is above the capacity {capacity}"
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    tight = _best_fit(order, sizes, capacity)
    shape = replicas, max(1, -(-len(tight) // (replicas * multiple))) * multiple
    dealt = (
        _fill(order, sizes, costs, capacity, shape)
        or _fill(order, sizes, costs, capacity, shape, tight=True)
        or _deal(tight, costs, shape)
    )
    return [sorted(replica, key=lambda bin_: -sum(sizes[index] for index in bin_)) for replica in dealt]


def _best_fit(order: Sequence[int], sizes: Sequence[int], capacity: int) -> list[Bin]:
    """Put each sequence into the fullest bin with room, or into a new one."""
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
    """Give each sequence to the cheapest replica with room, there to the emptiest bin, or if `tight` to the fullest.

    `shape` is the number of replicas and that of the bins of each. Return None where a sequence fits nowhere.
    """
    replicas, count = shape
    filled: list[list[Bin]] = [[[] for _ in range(count)] for _ in range(replicas)]
    rooms = [[(capacity, number) for number in range(count)] for _ in range(replicas)]  # of each replica, ascending
    queue = [(0.0, replica) for replica in range(replicas)]  # a heap, the cheapest first
    for index in order:
        size, full = sizes[index], []
        while queue and rooms[queue[0][1]][-1][0] < size:
            full.append(heapq.heappop(queue))
        if not queue:
            return None
        cost, replica = queue[0]
        heapq.heapreplace(queue, (cost + costs[index], replica))
        room, number = rooms[replica].pop(bisect_left(rooms[replica], (size, 0)) if tight else -1)
        insort(rooms[replica], (room - size, number))
        filled[replica][number].append(index)
        for entry in full:
            heapq.heappush(queue, entry)
    return filled


def _deal(bins: Sequence[Bin], costs: Sequence[float], shape: tuple[int, int]) -> list[list[Bin]]:
    """Give each bin, the costliest first, to the cheapest replica with a place for one more."""
    totals = [sum(costs[index] for index in bin_) for bin_ in bins]
    order = sorted(range(len(bins)), key=lambda number: (-totals[number], number))
    dealt = _fill(order, [1] * len(bins), totals, 1, shape)
    assert dealt, f"{len(bins)} bins for {shape[0]} x {shape[1]} places"
    return [[[index for number in place for index in bins[number]] for place in replica] for replica in dealt]
