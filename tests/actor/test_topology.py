from __future__ import annotations

from typing import Any

import pytest

from dapo_megatron.config import ParallelConfig
from dapo_megatron.errors import ConfigError
from tests.helpers.distributed import run_distributed


def test_one_process_needs_no_torchrun(alone: Any) -> None:
    from dapo_megatron.actor import topology

    assert (alone.world_size, alone.dp, alone.is_leader) == (1, 1, True)
    assert topology.scatter(["mine"], alone) == "mine"
    assert topology.broadcast({"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match="one entry per data-parallel rank: 1, got 2 entries"):
        topology.scatter(["a", "b"], alone)


def test_world_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dapo_megatron.actor import topology

    monkeypatch.setenv("WORLD_SIZE", "12")
    with pytest.raises(ConfigError, match=r"tp\(4\) x pp\(2\) x cp\(1\) = 8 does not divide world size 12"):
        topology.initialize(ParallelConfig(tp=4, pp=2))


def _join() -> Any:
    from dapo_megatron.actor import topology

    topo = topology.initialize(ParallelConfig(cp=2))
    got = topology.scatter([f"replica {i}" for i in range(topo.dp)] if topo.is_leader else None, topo)
    word = topology.broadcast("hello" if topo.is_leader else None)
    topology.shutdown()
    return topo, got, word


@pytest.mark.multiproc
def test_every_rank_gets_the_entry_of_its_replica() -> None:
    results = run_distributed(_join, 4)
    assert sorted(topo.dp_rank for topo, _, _ in results) == [0, 0, 1, 1]
    for rank, (topo, got, word) in enumerate(results):
        assert topo.rank == rank
        assert got == f"replica {topo.dp_rank}"
        assert word == "hello"
