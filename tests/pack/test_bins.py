import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.pack import bins as module
from dapo_megatron.pack.bins import partition

CAPACITY = 100
SIZES = st.lists(st.integers(0, CAPACITY), max_size=40)


def deal(sizes, capacity=CAPACITY, replicas=1, multiple=1):
    """With attention that costs as much as the rest at the capacity."""
    costs = [size + size * size / capacity for size in sizes]
    return partition(sizes, costs, capacity=capacity, replicas=replicas, multiple=multiple)


def totals(dealt, sizes):
    return [sum(sizes[index] for bin_ in replica for index in bin_) for replica in dealt]


@given(SIZES, st.integers(1, 5), st.integers(1, 3))
@settings(deadline=None)
def test_every_index_once_within_capacity_and_equally_many_bins(sizes, replicas, multiple):
    dealt = deal(sizes, replicas=replicas, multiple=multiple)
    bins = [bin_ for replica in dealt for bin_ in replica]
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in bin_) <= CAPACITY for bin_ in bins)
    assert len(dealt) == replicas
    assert len({len(replica) for replica in dealt}) == 1
    assert len(dealt[0]) % multiple == 0


@given(SIZES, st.integers(1, 5))
@settings(deadline=None)
def test_number_of_bins_is_near_the_least(sizes, replicas):
    used = len(deal(sizes, replicas=replicas)[0])
    least = max(1, -(-sum(sizes) // (CAPACITY * replicas)))
    # Two of best fit's bins never fit into one, so it needs less than twice the total volume, plus one bin.
    assert least <= used <= max(1, -(-(2 * sum(sizes) // CAPACITY + 1) // replicas))


def test_one_bin_where_all_fits():
    assert deal([40, 30, 30]) == [[[0, 1, 2]]]
    assert [len(replica) for replica in deal([50] * 8, replicas=4)] == [1] * 4


def test_more_bins_than_needed_are_used_evenly():
    assert deal([10, 10, 10, 10], multiple=2) == [[[1, 3], [0, 2]]]


def test_levelled_where_that_fits_and_tight_where_it_does_not():
    sizes = [9, 8, 8, 7, 6, 3]
    assert deal(sizes, capacity=21) == [[[2, 3, 4], [0, 1, 5]]]  # 21 and 20; levelling makes 22 and 19
    assert deal(sizes, capacity=22) == [[[0, 3, 4], [1, 2, 5]]]


def test_tight_packing_still_shares_cost_between_ranks():
    sizes = [11, 10, 9, 9, 8, 7, 7, 5, 4]
    dealt = deal(sizes, capacity=18, replicas=2)
    assert sorted(totals(dealt, sizes)) == [34, 36]
    assert [sorted(map(sorted, replica)) for replica in dealt] == [[[0, 5], [3, 7, 8]], [[1, 4], [2, 6]]]


def test_rank_passed_over_for_want_of_room_gets_the_next_that_fits():
    sizes, costs = [10, 6, 6, 3, 2], [30.0, 10.0, 10.0, 3.0, 2.0]
    # 10 here, 6 and 6 there; 3 wants the cheaper replica, which has no room for it, but has for 2.
    assert module._fill(range(5), sizes, costs, 14, (2, 1)) == [[[0, 3]], [[1, 2, 4]]]


def test_best_fit_is_dealt_out_where_ranks_taking_turns_need_more_bins():
    sizes = [10, 9, 5, 4, 2]  # in turn: 10 and 4 here, 9 and 5 there, and no room for 2
    assert deal(sizes, capacity=15, replicas=2) == [[[0, 2]], [[1, 3, 4]]]


def test_whole_bins_go_to_the_cheapest_rank_with_a_place():
    def dealt(costs):
        replicas = module._deal([[number] for number in range(len(costs))], costs, shape=(2, 2))
        return [sorted(replica) for replica in replicas]

    assert dealt([6.0, 5.0, 4.0, 1.0]) == [[[0], [3]], [[1], [2]]]
    assert dealt([9.0, 1.0, 1.0, 1.0]) == [[[0], [3]], [[1], [2]]]
    assert dealt([9.0, 1.0, 1.0]) == [[[], [0]], [[1], [2]]]


def test_ranks_get_like_costs_although_tokens_alone_would_share_differently():
    sizes = [100, 50, 50, 10, 10, 10]
    costs = [size + size * size / 50 for size in sizes]  # 300, 100, 100, 12, 12, 12
    linear = partition(sizes, [float(size) for size in sizes], capacity=200, replicas=2)
    assert sorted(totals(linear, sizes)) == [110, 120]
    assert sorted(totals(partition(sizes, costs, capacity=200, replicas=2), costs)) == [236, 300]


def test_a_full_mini_batch_is_even_in_cost_and_nearly_in_size():
    rng = random.Random(0)
    sizes = [min(20_480, round(rng.lognormvariate(7.7, 0.8))) for _ in range(512)]
    costs = [size + size * size / 61_440 for size in sizes]
    dealt = partition(sizes, costs, capacity=32_768, replicas=16)
    for loads, tolerance in ((totals(dealt, costs), 0.005), (totals(dealt, sizes), 0.02)):
        assert max(loads) * len(loads) / sum(loads) - 1 < tolerance


def test_fullest_first():
    (replica,) = deal([60, 60, 60, 30, 20, 20])
    sizes = [sum([60, 60, 60, 30, 20, 20][index] for index in bin_) for bin_ in replica]
    assert sizes == sorted(sizes, reverse=True) == [90, 80, 80]


def test_no_sizes_give_one_empty_bin_per_rank():
    assert deal([], replicas=2) == [[[]], [[]]]
    assert deal([], replicas=2, multiple=2) == [[[], []], [[], []]]


def test_size_above_capacity_is_refused():
    with pytest.raises(AssertionError, match="size 11 is above the capacity 10"):
        deal([3, 11], capacity=10)
