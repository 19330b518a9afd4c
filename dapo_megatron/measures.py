"""Numbers that are measured in parts, typed by how the parts of all micro-batches, ranks and updates come together.

A mean keeps its total and its count until it is shown, so that there is never a mean of means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what is shown of a run starts without torch
    from torch import Tensor

    Number = Tensor | float


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum, whose parts are added.

    >>> Sum(3).value
    3.0
    """

    total: Number

    @property
    def value(self) -> float:
        return float(self.total)


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean, whose totals and counts are added; nan where nothing was counted.

    >>> Mean(total=3, count=4).value
    0.75
    """

    total: Number
    count: Number = 1

    @property
    def value(self) -> float:
        return float(self.total) / float(self.count) if self.count else math.nan


@dataclass(frozen=True, slots=True)
class Max:
    """A maximum, whose largest part counts; where any is nan, it is nan or, once ranks were compared, inf.

    >>> Max(3).value
    3.0
    """

    largest: Number

    @property
    def value(self) -> float:
        return float(self.largest)


Measure = Sum | Mean | Max
Measures = Mapping[str, Measure]
"""Name of a metric, the same from where it is made to where it is shown -> what was measured."""


def reduce(
    parts: Sequence[Measures],
    add: Callable[[Tensor], Tensor] | None = None,
    largest: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Measure]:
    """Bring the parts of measures together, in float64. Collective where `add` and `largest` are.

    >>> reduce([{"a": Mean(1.0, 2), "b": Max(5)}, {"a": Mean(4.0, 3), "b": Max(1)}])
    {'a': Mean(total=5.0, count=5.0), 'b': Max(largest=5.0)}

    Args:
        parts: at least one; all have the same names, with measures of the same types, in numbers or 0-d tensors.
        add: adds a float64 tensor up over ranks; None for a single rank.
        largest: takes the largest over ranks of each entry of a float64 tensor; None for a single rank.
    """
    import torch

    first = dict(sorted(parts[0].items()))  # the same order on all ranks, whatever made them

    def table(names: list[str]) -> Tensor:
        rows = [[number for name in names for number in _numbers(part[name])] for part in parts]
        device = next((number.device for row in rows for number in row if isinstance(number, torch.Tensor)), None)
        return torch.stack(
            [torch.stack([torch.as_tensor(n, dtype=torch.float64, device=device) for n in row]) for row in rows]
        ).detach()

    reduced: dict[str, Measure] = {}
    if sums := [name for name, measure in first.items() if not isinstance(measure, Max)]:
        totals = table(sums).sum(0)
        numbers = iter((add(totals) if add else totals).tolist())
        reduced |= {name: type(first[name])(*islice(numbers, len(_numbers(first[name])))) for name in sums}
    if maxima := [name for name in first if name not in reduced]:
        highest = table(maxima).amax(0)
        highest = (largest(highest) if largest else highest).tolist()
        reduced |= {name: Max(value) for name, value in zip(maxima, highest, strict=True)}
    return {name: reduced[name] for name in parts[0]}


def values(measures: Measures) -> dict[str, float]:
    """Return the value of each measure, as it is shown."""
    return {name: measure.value for name, measure in measures.items()}


def _numbers(measure: Measure) -> list[Number]:
    return [getattr(measure, field.name) for field in fields(measure)]
