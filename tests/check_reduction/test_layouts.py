from __future__ import annotations

import pytest

from dapo_megatron.check_reduction.layouts import STANDARD, Layout, choose
from dapo_megatron.config import ParallelConfig
from dapo_megatron.errors import ConfigError


def test_a_name_says_sizes_and_switches() -> None:
    layout = Layout.parse("dp2xtp2+sp+dist-opt")
    assert (layout.dp, layout.parallel.tp, layout.parallel.pp, layout.ranks) == (2, 2, 1, 4)
    assert layout.parallel.sequence_parallel and layout.parallel.distributed_optimizer
    assert Layout.parse("1") == Layout("1", 1, ParallelConfig(distributed_optimizer=False))
    assert Layout.parse("pp2+vpp3").parallel.vpp == 3


@pytest.mark.parametrize("name", STANDARD)
def test_sizes_are_a_name_again(name: str) -> None:
    layout = Layout.parse(name)
    again = Layout.parse(layout.sizes)
    assert (again.dp, again.parallel) == (layout.dp, layout.parallel)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ep2", r"'ep2' in 'ep2' is neither an axis .* a layout looks like"),
        ("tp0", "'tp0'"),
        ("", "a name is empty"),
        ("1xdp2", "'1' in '1xdp2'"),
        ("tp2xtp4", "'tp2xtp4' says tp twice"),
        ("dp2+sp", r"'dp2\+sp' cannot be: sequence_parallel .* tp is 1"),
        ("vpp2", r"'vpp2' cannot be: vpp\(2\) .* pp is 1"),
    ],
)
def test_what_is_no_layout_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout.parse(name)


def test_case_and_spaces_in_a_name_say_nothing() -> None:
    assert Layout.parse(" DP2 + dist-opt ") == Layout.parse("dp2+dist-opt")


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
    with pytest.raises(ConfigError, match=r"dp4xtp2 wants 8 ranks, but --processes allows 4"):
        choose(["1", "dp4xtp2"], Layout.own(ParallelConfig(), 1), 4)
