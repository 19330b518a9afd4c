from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dapo_megatron.config import EngineConfig
from dapo_megatron.rollout.environment import environment
from dapo_megatron.rollout.place import Place

CPU = Place(index=0, host="127.0.0.1", port=8000, gpus=(), memory_fraction=0.4, seed=0)
GPU = replace(CPU, gpus=("2", "3"))
TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "1",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "1",
    "MKL_NUM_THREADS": "1",
}


@pytest.mark.parametrize("place", [CPU, GPU], ids=["cpu", "gpu"])
def test_what_torchrun_told_the_ranks_is_not_told_to_engines(place: Place) -> None:
    env = environment(EngineConfig(), place, TORCHRUN | {"PATH": "/bin", "NCCL_DEBUG": "INFO"})
    assert not TORCHRUN.keys() & env.keys()
    assert (env["PATH"], env["NCCL_DEBUG"]) == ("/bin", "INFO")


def test_engines_on_cpu_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads(cores: int, **engine: Any) -> str:
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
        return environment(EngineConfig(**engine), CPU, {"OMP_NUM_THREADS": "64"})["OMP_NUM_THREADS"]

    assert (threads(9), threads(9, count=2), threads(1)) == ("9", "4", "1")
    assert threads(9, count=2, tensor_parallel=2) == "2"


def test_an_engine_outlives_a_push_that_breaks_off_unless_the_user_wants_the_dump() -> None:
    name = "TORCH_NCCL_DUMP_ON_TIMEOUT"
    assert environment(EngineConfig(), GPU, {})[name] == "0"
    assert environment(EngineConfig(), GPU, {name: "1"})[name] == "1"


def test_engines_on_gpus_see_theirs() -> None:
    assert environment(EngineConfig(), GPU, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})["CUDA_VISIBLE_DEVICES"] == "2,3"
