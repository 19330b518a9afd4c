from __future__ import annotations

import pytest
import torch

from dapo_megatron.measures import values
from dapo_megatron.obs.memory import PeakMemory
from dapo_megatron.obs.metrics import METRICS, PHASES

MIB_250 = 250 * 2**20


def test_a_phase_has_its_own_peak() -> None:
    memory = PeakMemory()
    with memory.phase("rollout"):
        pass
    with memory.phase("update"):
        torch.ones(MIB_250, dtype=torch.uint8)
    with memory.phase("publish"):
        pass
    peaks = values(memory.take())
    # Whatever else the process holds is the same in all three, give or take a little.
    assert peaks["memory/update"] - peaks["memory/rollout"] == pytest.approx(250 / 1024, rel=0.2)
    assert peaks["memory/publish"] < peaks["memory/update"] - 0.8 * 250 / 1024
    assert set(peaks) <= set(METRICS)


def test_the_larger_peak_of_a_phase_that_comes_twice_counts() -> None:
    memory = PeakMemory()
    with memory.phase("offload"):
        torch.ones(MIB_250, dtype=torch.uint8)
    first = values(memory.take())["memory/offload"]
    with memory.phase("offload"):
        torch.ones(MIB_250, dtype=torch.uint8)
    with memory.phase("offload"):
        pass
    assert values(memory.take())["memory/offload"] == pytest.approx(first, rel=0.1)
    assert memory.take() == {}


def test_ranks_are_compared() -> None:
    memory = PeakMemory()
    with memory.phase("rollout"):
        pass
    assert values(memory.take(lambda peaks: torch.full_like(peaks, 7.0))) == {"memory/rollout": 7.0}


def test_what_is_no_phase_of_a_step_is_not_measured() -> None:
    memory = PeakMemory()
    with memory.phase("evaluating (before)"):
        pass
    assert memory.take() == {}


def test_every_peak_has_its_meaning() -> None:
    assert {f"memory/{phase}" for phase in PHASES} <= set(METRICS)


@pytest.mark.gpu
def test_on_a_gpu_torchs_allocator_is_asked() -> None:
    memory = PeakMemory()
    with memory.phase("update"):
        kept = torch.ones(2 * MIB_250, dtype=torch.uint8, device="cuda")
        torch.ones(MIB_250, dtype=torch.uint8, device="cuda")
    with memory.phase("publish"):
        pass
    peaks = values(memory.take())
    assert peaks["memory/update"] - peaks["memory/publish"] == pytest.approx(250 / 1024, rel=1e-3)
    assert peaks["memory/device"] > peaks["memory/reserved"] > kept.numel() / 2**30
