"""Data-parallel replicas as threads of one process (`algo.replicas.Replicas`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import TypeVar

import torch
from torch import Tensor

S = TypeVar("S")
T = TypeVar("T")


class Alone:
    """The only replica."""

    def sum(self, values: Tensor) -> Tensor:
        return values.clone()

    def max(self, values: Tensor) -> Tensor:
        return values.clone()


class _Member:
    def __init__(self, rank: int, box: list[tuple[str, Tensor]], barrier: Barrier) -> None:
        self._rank, self._box, self._barrier = rank, box, barrier

    def sum(self, values: Tensor) -> Tensor:
        return self._gather("sum", values).sum(0)

    def max(self, values: Tensor) -> Tensor:
        assert values.is_floating_point(), values.dtype
        return self._gather("max", values).amax(0)

    def _gather(self, call: str, values: Tensor) -> Tensor:
        self._box[self._rank] = call, values
        self._barrier.wait()
        calls, parts = zip(*self._box, strict=True)
        self._barrier.wait()
        assert len({(call, part.dtype, part.shape) for call, part in zip(calls, parts, strict=True)}) == 1, parts
        return torch.stack(parts)


def on_replicas(work: Callable[[S, _Member], T], shares: Sequence[S]) -> list[T]:
    """`work` with the share of each replica. Fails where they do not make the same calls."""
    barrier = Barrier(len(shares), timeout=10)
    box: list[tuple[str, Tensor]] = [("", torch.empty(0))] * len(shares)

    def member(rank: int) -> T:
        try:
            return work(shares[rank], _Member(rank, box, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(shares)) as pool:
        futures = [pool.submit(member, rank) for rank in range(len(shares))]
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
