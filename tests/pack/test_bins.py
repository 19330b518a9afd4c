import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.pack.bins import partition

CAPACITY = 100
SIZES = st.lists(st.integers(1, CAPACITY), max_size=40)


@given(SIZES, st.integers(1, 5))
@settings(deadline=None)
def test_every_index_once_within_capacity_and_equally_many_bins(sizes, ranks):
    dealt = partition(sizes, capacity=CAPACITY, ranks=ranks)
    bins = [bin_ for rank in dealt for bin_ in rank]
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in bin_) <= CAPACITY for bin_ in bins)
    assert len(dealt) == ranks
    assert len({len(rank) for rank in dealt}) == 1


@given(SIZES, st.integers(1, 5))
@settings(deadline=None)
def test_number_of_bins_is_near_the_least(sizes, ranks):
    used = len(partition(sizes, capacity=CAPACITY, ranks=ranks)[0])
    least = max(1, -(-sum(sizes) // (CAPACITY * ranks)))
    # Two of best fit's bins never fit into one, so it needs less than twice the total volume, plus one bin.
    assert least <= used <= max(1, -(-(2 * sum(sizes) // CAPACITY + 1) // ranks))


def test_one_bin_where_all_fits():
    assert partition([40, 30, 30], capacity=100, ranks=1) == [[[0, 1, 2]]]
    assert [len(rank) for rank in partition([50] * 8, capacity=100, ranks=4)] == [1] * 4


def test_tight_packing_stays_where_levelling_would_overflow():
    sizes = [9, 8, 8, 7, 6, 3]
    assert partition(sizes, capacity=21, ranks=1) == [[[2, 3, 4], [0, 1, 5]]]  # 21 and 20; levelling makes 19 and 22
    assert partition(sizes, capacity=22, ranks=1) == [[[0, 3, 4], [1, 2, 5]]]


def test_ranks_get_like_totals():
    sizes = [1 + index * index % 97 for index in range(512)]
    dealt = partition(sizes, capacity=300, ranks=8)
    totals = [sum(sizes[index] for bin_ in rank for index in bin_) for rank in dealt]
    assert max(totals) - min(totals) <= 3


def test_no_sizes_give_one_empty_bin_per_rank():
    assert partition([], capacity=10, ranks=2) == [[[]], [[]]]


def test_size_above_capacity_is_refused():
    with pytest.raises(AssertionError, match="size 11 is above the capacity 10"):
        partition([3, 11], capacity=10, ranks=1)
