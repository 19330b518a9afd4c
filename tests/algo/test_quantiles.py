import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.algo.quantiles import quantiles
from tests.helpers.replicas import Alone, on_replicas

FRACTIONS = [0.0, 0.01, 0.07, 0.5, 0.99, 0.999, 1.0]


def of(values, fractions):
    return quantiles(torch.tensor(values, dtype=torch.float32), fractions, Alone()).tolist()


def test_smallest_value_that_enough_values_do_not_exceed():
    assert of([4.0, 1.0, 3.0, 2.0], [0.0, 0.25, 0.26, 0.5, 0.75, 1.0]) == [1.0, 1.0, 2.0, 2.0, 3.0, 4.0]
    assert of([-1.5], FRACTIONS) == [-1.5] * 7


def test_a_fraction_is_the_decimal_number_that_it_is_written_as():
    assert 0.07 * 100 > 7  # in binary
    assert of([float(value) for value in range(1, 101)], [0.07]) == [7.0]


def test_values_at_the_ends_of_float32():
    values = [-math.inf, -3.4e38, -1e-45, 0.0, 1e-45, 3.4e38, math.inf]
    assert of(values, [0.0, *(k / 10 for k in (2, 4, 5, 7, 8)), 1.0]) == torch.tensor(values).tolist()


def test_nan_is_larger_than_infinity():
    for nan in (math.nan, -math.nan):
        low, high, most = of([math.inf, nan, 1.0, nan], [0.25, 0.5, 0.51])
        assert (low, high) == (1.0, math.inf)
        assert math.isnan(most)


def test_without_values_nan():
    results = on_replicas(lambda values, replicas: quantiles(values, [0.0, 0.5], replicas), [torch.empty(0)] * 2)
    assert all(result.isnan().all() for result in results)


def test_wants_float32():
    with pytest.raises(AssertionError, match="float64"):
        quantiles(torch.zeros(2, dtype=torch.float64), [0.5], Alone())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False) | st.sampled_from([1.0, 1.0 + 2**-23, -1.0, 0.0]), max_size=300),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_like_sorting_all_values_however_they_are_spread(values, replicas, rng):
    shares = [[] for _ in range(replicas)]
    for value in values:
        rng.choice(shares).append(value)
    results = on_replicas(
        lambda share, members: quantiles(torch.tensor(share, dtype=torch.float32), FRACTIONS, members).tolist(), shares
    )
    assert all(str(result) == str(results[0]) for result in results)
    if values:
        ordered = sorted(values)
        ranks = [max(1, -(-round(fraction * 1000) * len(values) // 1000)) for fraction in FRACTIONS]
        assert results[0] == [ordered[rank - 1] for rank in ranks]


def test_many_values_agree_with_sorting():
    rng = random.Random(1)
    values = [rng.lognormvariate(0, 0.01) for _ in range(50_000)]
    tensor = torch.tensor(values, dtype=torch.float32)
    ordered = tensor.sort().values
    expected = [ordered[max(1, math.ceil(round(f * 1000) * 50)) - 1].item() for f in FRACTIONS]
    assert quantiles(tensor, FRACTIONS, Alone()).tolist() == expected
