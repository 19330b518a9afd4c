from __future__ import annotations

import re

import pytest

from dapo_megatron.check_reduction.layouts import STANDARD, Layout, choose
from dapo_megatron.config import ParallelConfig
from dapo_megatron.errors import ConfigError


@pytest.mark.parametrize("layout", STANDARD.values(), ids=STANDARD)
def test_a_standard_name_says_sizes_and_switches(layout: Layout) -> None:
    assert layout.name == layout.sizes == str(layout)
    assert layout.ranks <= 4


def test_the_plain_layouts_have_the_plain_optimizer() -> None:
    assert STANDARD["1"] == Layout("1", 1, ParallelConfig(distributed_optimizer=False))
    assert STANDARD["tp2+sp"].parallel == ParallelConfig(tp=2, sequence_parallel=True, distributed_optimizer=False)


@pytest.mark.parametrize("name", ["dp4", "tp2xtp2", "", "dp2+sp", "yours+sp"])
def test_another_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{re.escape(name)}' is not one of yours, 1, dp2, .*parallel\.tp=4 "):
        choose(["1", name], Layout.own(ParallelConfig(), 1), 4)


def test_case_and_spaces_around_a_name_say_nothing() -> None:
    assert choose([" DP2+dist-opt "], Layout.own(ParallelConfig(), 1), 4) == [STANDARD["dp2+dist-opt"]]


BIG = ParallelConfig(tp=8, pp=4, cp=2, vpp=4, sequence_parallel=True)


def test_the_own_layout_is_halved_until_it_fits() -> None:
    own = Layout.own(BIG, ranks=128)
    assert own.sizes == "dp2xtp8xpp4xcp2+vpp4+sp+dist-opt"
    small = own.fitted(4)
    assert small.ranks == 4
    assert str(small) == "yours: tp2xcp2+sp+dist-opt"
    assert own.fitted(128).sizes == "dp2xtp8xpp4xcp2+vpp2+sp+dist-opt"
    fits = Layout.own(ParallelConfig(), ranks=2)
    assert fits.sizes == "dp2+dist-opt"
    assert fits.fitted(4) == fits


def test_the_own_layout_has_the_ranks_of_a_run() -> None:
    assert Layout.own(BIG, ranks=1).dp == 2  # torchrun decides
    assert Layout.own(ParallelConfig(), ranks=1).ranks == 1
    with pytest.raises(ConfigError, match="does not divide world size 2"):
        Layout.own(ParallelConfig(tp=3), ranks=2)


def test_the_own_layout_comes_first_and_only_once() -> None:
    own = Layout.own(ParallelConfig(), 2)
    names = [str(layout) for layout in choose(None, own, 4)]
    assert names == ["yours: dp2+dist-opt", *(name for name in STANDARD if name != "dp2+dist-opt")]
    assert [str(layout) for layout in choose(["dp2", "yours", "dp2"], own, 4)] == ["dp2", "yours: dp2+dist-opt"]


def test_a_layout_that_wants_more_ranks_is_refused_when_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"dp2xtp2 wants 4 ranks, but --processes allows 2"):
        choose(["1", "dp2xtp2"], Layout.own(ParallelConfig(), 1), 2)
