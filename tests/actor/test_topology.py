from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dapo_megatron.config import ParallelConfig
from dapo_megatron.errors import ConfigError, DapoError
from tests.helpers.distributed import run_distributed


def test_one_process_needs_no_torchrun(alone: Any) -> None:
    assert (alone.world_size, alone.dp, alone.is_leader) == (1, 1, True)
    assert [tensor.tolist() for tensor in alone.scatter(lambda replica: [torch.tensor([replica, 7])])] == [[0, 7]]
    assert alone.broadcast({"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match="what each data-parallel replica gets; it got None"):
        alone.scatter(None)


def test_world_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dapo_megatron.actor import topology

    monkeypatch.setenv("WORLD_SIZE", "12")
    with pytest.raises(ConfigError, match=r"tp\(4\) x pp\(2\) x cp\(1\) = 8 does not divide world size 12"):
        topology.initialize(ParallelConfig(tp=4, pp=2))


def test_ranks_that_are_not_there_in_time_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the ranks were not started by torchrun, whose own store they would use."""
    from datetime import timedelta

    from dapo_megatron.actor import topology

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        DapoError, match=rf"^rank 1 of 2 could not .* 127.0.0.1:{port} within launch.join_seconds\(1\): "
    ):
        topology.rendezvous(timedelta(seconds=1))


@pytest.mark.parametrize(
    ("local_rank", "gpus", "by_torchrun", "device"),
    [(0, 1, True, 0), (3, 8, True, 3), (3, 1, False, 0), (1, 1, True, None), (3, 2, False, None), (8, 8, True, None)],
)
def test_each_rank_has_a_gpu_of_its_own(
    local_rank: int, gpus: int, by_torchrun: bool, device: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dapo_megatron.actor import topology

    chosen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setattr("torch.cuda.init", lambda: None)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    if device is None:
        with pytest.raises(ConfigError, match=f"local rank {local_rank} has no GPU: {gpus} are visible"):
            topology.prepare()
    else:
        topology.prepare()
        assert chosen == [device]


def _join() -> Any:
    import os

    from dapo_megatron.actor import topology

    topo = topology.initialize(ParallelConfig(cp=2))
    back = topo.gather(f"replica {topo.dp_rank}, rank {topo.rank}")
    word = topo.broadcast("hello" if topo.is_leader else None)
    value = torch.tensor([10.0**topo.dp_rank, -1.0 - topo.dp_rank])
    sums = topo.sum(value).tolist(), topo.sum(torch.tensor(3 + topo.dp_rank)).tolist()
    largest = topo.max(torch.cat([value, torch.tensor([float(topo.rank)])])).tolist()
    topology.shutdown()
    return (topo.rank, topo.dp_rank), back, word, sums, largest, os.environ.get("GLOO_SOCKET_IFNAME")


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
def test_each_replica_counts_once_and_speaks_through_its_first_rank() -> None:
    results = run_distributed(_join, 4)
    assert sorted(dp_rank for (_, dp_rank), *_ in results) == [0, 0, 1, 1]
    for rank, ((own_rank, _), back, word, sums, largest, interface) in enumerate(results):
        assert own_rank == rank
        assert word == "hello"
        assert sums == ([11.0, -3.0], 7)
        assert largest == [10.0, -1.0, 3.0], "of all ranks, those of one replica as well"
        assert interface == "lo", "ranks of one machine stay off its network"
        assert back == (["replica 0, rank 0", "replica 1, rank 2"] if rank == 0 else None)


CHUNK = 96
"""Bytes: most of the tensors below take several messages, the last of them a short one."""


def tensors_of(replica: int) -> list[Tensor]:
    """Make tensors of several shapes and types, others for every replica."""
    generator = torch.Generator().manual_seed(replica)
    strange = torch.tensor([torch.nan, -torch.inf, -0.0, 1e-45])
    return [
        torch.randint(150_000, (100 + 50 * replica,), generator=generator, dtype=torch.int32),
        torch.rand(200 - 60 * replica, generator=generator) < 0.5,
        torch.cat([strange, torch.randn(60, generator=generator)]),
        torch.randn(12, 10, generator=generator).T,
        torch.empty(replica, 0, dtype=torch.bool),
        torch.tensor(1 + replica),
        *([torch.tensor([2.5])] * replica),
    ]


def _scatter(parallel: dict[str, Any]) -> Any:
    from dapo_megatron.actor import topology

    topo = topology.initialize(ParallelConfig(**parallel))
    asked = []

    def share(replica: int) -> list[Tensor]:
        asked.append(replica)
        return tensors_of(replica)

    whole, topology.CHUNK_BYTES = topology.CHUNK_BYTES, CHUNK
    try:
        got = topo.scatter(share if topo.is_leader else None)
        again = topo.scatter((lambda replica: [torch.tensor([replica])]) if topo.is_leader else None)
    finally:
        topology.CHUNK_BYTES = whole
        topology.shutdown()
    return topo.dp_rank, sorted(asked), got, again


@pytest.mark.multiproc
@pytest.mark.parametrize("parallel", [{}, {"tp": 2}, {"cp": 2}, {"pp": 2}, {"pp": 2, "cp": 2}], ids=str)
def test_every_rank_gets_the_tensors_of_its_replica(parallel: dict[str, Any]) -> None:
    results = run_distributed(_scatter, 4, parallel)
    replicas = sorted({dp_rank for dp_rank, *_ in results})
    assert len(replicas) == ParallelConfig(**parallel).data_parallel(4)
    for rank, (dp_rank, asked, got, again) in enumerate(results):
        assert asked == (replicas if rank == 0 else []), "the leader makes each share once"
        wanted = tensors_of(dp_rank)
        assert [(tensor.shape, tensor.dtype) for tensor in got] == [(tensor.shape, tensor.dtype) for tensor in wanted]
        assert all(bits(one) == bits(other) for one, other in zip(got, wanted, strict=True))
        assert [tensor.tolist() for tensor in again] == [[dp_rank]]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()
