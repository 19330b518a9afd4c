from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from dapo_megatron.config import ParallelConfig
from dapo_megatron.errors import ConfigError
from tests.helpers.distributed import run_distributed


def test_one_process_needs_no_torchrun(alone: Any) -> None:
    assert (alone.world_size, alone.dp, alone.is_leader) == (1, 1, True)
    assert alone.scatter(["mine"]) == "mine"
    assert alone.broadcast({"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match="one entry per data-parallel replica: 1, got 2 entries"):
        alone.scatter(["a", "b"])


def test_world_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dapo_megatron.actor import topology

    monkeypatch.setenv("WORLD_SIZE", "12")
    with pytest.raises(ConfigError, match=r"tp\(4\) x pp\(2\) x cp\(1\) = 8 does not divide world size 12"):
        topology.initialize(ParallelConfig(tp=4, pp=2))


def _join() -> Any:
    import os

    import torch

    from dapo_megatron.actor import topology

    topo = topology.initialize(ParallelConfig(cp=2))
    got = topo.scatter([f"replica {i}" for i in range(topo.dp)] if topo.is_leader else None)
    back = topo.gather(f"{got}, rank {topo.rank}")
    word = topo.broadcast("hello" if topo.is_leader else None)
    value = torch.tensor([10.0**topo.dp_rank, -1.0 - topo.dp_rank])
    sums = topo.sum(value).tolist(), topo.sum(torch.tensor(3 + topo.dp_rank)).tolist()
    largest = topo.max(value).tolist()
    topology.shutdown()
    return (topo.rank, topo.dp_rank), got, back, word, sums, largest, os.environ.get("GLOO_SOCKET_IFNAME")


def _left_alone(leaves: bool) -> tuple[bool, str]:
    """On rank 0: whether what a collective raises is taken for a lost rank, and its words."""
    import time
    from datetime import timedelta

    from megatron.core import parallel_state as mpu

    from dapo_megatron.actor import topology

    topo = topology.initialize(ParallelConfig(), timeout=timedelta(seconds=2))
    seen = (False, "")
    if topo.is_leader:
        try:
            topo.broadcast("here")
            dist.barrier(group=topo.host_world)
        except RuntimeError as error:
            seen = topology.is_lost_peer(error), str(error)
    else:
        topo.broadcast(None)
        time.sleep(0 if leaves else 4)
    mpu.destroy_model_parallel()
    dist.destroy_process_group()
    return seen


@pytest.mark.multiproc
@pytest.mark.parametrize(("leaves", "words"), [(True, "Connection"), (False, "Timed out")])
def test_a_rank_that_is_gone_or_late_is_told_from_other_errors(leaves: bool, words: str) -> None:
    (lost, said), _ = run_distributed(_left_alone, 2, leaves)
    assert lost and words in said


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (dist.DistNetworkError("failed to recv"), True),
        (RuntimeError("shapes do not match"), False),
        (ConnectionError("Connection refused"), False),
    ],
)
def test_errors_of_other_backends_are_known_by_their_class(error: Exception, lost: bool) -> None:
    from dapo_megatron.actor import topology

    assert topology.is_lost_peer(error) == lost


@pytest.mark.multiproc
def test_every_rank_gets_the_entry_of_its_replica_and_each_replica_counts_once() -> None:
    results = run_distributed(_join, 4)
    assert sorted(dp_rank for (_, dp_rank), *_ in results) == [0, 0, 1, 1]
    for rank, ((own_rank, dp_rank), got, back, word, sums, largest, interface) in enumerate(results):
        assert own_rank == rank
        assert got == f"replica {dp_rank}"
        assert word == "hello"
        assert sums == ([11.0, -3.0], 7)
        assert largest == [10.0, -1.0]
        assert interface == "lo", "ranks of one machine stay off its network"
        assert back == (["replica 0, rank 0", "replica 1, rank 2"] if rank == 0 else None)
