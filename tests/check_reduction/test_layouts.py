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
        ("", "''"),
        ("dp2+sp", r"'dp2\+sp' cannot be: sequence_parallel .* tp is 1"),
        ("vpp2", r"'vpp2' cannot be: vpp\(2\) .* pp is 1"),
    ],
)
def test_what_is_no_layout_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout.parse(name)


def test_the_own_layout_is_halved_until_it_fits() -> None:
    big = ParallelConfig(tp=8, pp=4, cp=2, vpp=4, sequence_parallel=True)
    small = Layout.own(big, ranks=128, limit=4)
    assert small.ranks == 4
    assert str(small) == "yours: tp2xcp2+sp+dist-opt"
    assert Layout.own(big, ranks=128, limit=128).sizes == "dp2xtp8xpp4xcp2+vpp2+sp+dist-opt"
    assert Layout.own(ParallelConfig(), ranks=2, limit=4).sizes == "dp2+dist-opt"


def test_the_own_layout_comes_first_and_only_once() -> None:
    names = [str(layout) for layout in choose(None, ParallelConfig(), 2, 4)]
    assert names == ["yours: dp2+dist-opt", *(name for name in STANDARD if name != "dp2+dist-opt")]


def test_a_layout_that_wants_more_ranks_is_refused_when_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"dp4xtp2 wants 8 ranks, but --processes allows 4"):
        choose(["1", "dp4xtp2"], ParallelConfig(), 1, 4)
