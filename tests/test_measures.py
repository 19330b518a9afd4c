from __future__ import annotations

import math

import pytest
import torch

from dapo_megatron.measures import Max, Mean, Measure, Sum, reduce, values


def test_parts_come_together_by_their_type() -> None:
    parts: list[dict[str, Measure]] = [
        {"tokens": Sum(3), "kl": Mean(1.0, 3), "ratio": Max(1.5)},
        {"tokens": Sum(torch.tensor(5)), "kl": Mean(torch.tensor(7.0), torch.tensor(5)), "ratio": Max(torch.tensor(9))},
    ]
    assert values(reduce(parts)) == {"tokens": 8, "kl": 1.0, "ratio": 9}
    assert list(reduce(parts)) == list(parts[0])


def test_ranks_are_added_and_compared() -> None:
    calls = []

    def add(totals: torch.Tensor) -> torch.Tensor:
        calls.append(("add", totals.dtype, totals.tolist()))
        return totals * 2

    def largest(entries: torch.Tensor) -> torch.Tensor:
        calls.append(("largest", entries.dtype, entries.tolist()))
        return entries + 1

    reduced = reduce([{"a": Mean(1, 2), "b": Max(5), "c": Sum(4)}], add, largest)
    assert calls == [("add", torch.float64, [1, 2, 4]), ("largest", torch.float64, [5])]
    assert reduced == {"a": Mean(2, 4), "b": Max(6), "c": Sum(8)}
    calls.clear()
    reduce([{"c": Sum(4), "b": Max(5), "a": Mean(1, 2)}], add, largest)  # the same order on a rank that has another
    assert calls[0][2][:2] == [1, 2]


def test_nothing_counted_is_no_number() -> None:
    assert math.isnan(Mean(0, 0).value)
    assert math.isnan(values(reduce([{"a": Mean(torch.tensor(0.0), torch.tensor(0))}]))["a"])


@pytest.mark.parametrize("measure", [Sum(torch.tensor(torch.nan)), Mean(math.nan, 3), Max(torch.tensor(torch.nan))])
def test_what_is_not_finite_shows(measure: Measure) -> None:
    assert math.isnan(values(reduce([{"a": measure}, {"a": measure}]))["a"])


def test_a_mean_of_means_is_none() -> None:
    """1 of 1 and 0 of 3 is a quarter, not a half; and large counts stay exact."""
    assert values(reduce([{"a": Mean(1, 1)}, {"a": Mean(0, 3)}])) == {"a": 0.25}
    assert reduce([{"a": Sum(2**40)}, {"a": Sum(1)}])["a"].value == 2**40 + 1
