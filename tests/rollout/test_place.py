from __future__ import annotations

from typing import Any

import pytest

from dapo_megatron.config import Config
from dapo_megatron.config_file import parse
from dapo_megatron.errors import ConfigError
from dapo_megatron.rollout.place import check_gpus, elsewhere, place


def config(run_seed: int = 42, /, **engine: Any) -> Config:
    return parse({"model": {"path": "m"}, "data": {"train": "t"}, "train": {"seed": run_seed}, "engine": engine})


def test_engines_sample_with_seeds_of_their_own() -> None:
    # Neighbouring runs and engines: sums of seed and number would coincide.
    seeds = {place(config(seed), index, 8000).seed for seed in range(4) for index in range(4)}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert place(config(0), 1, 8000).seed == 0xEF134F2A & 0x7FFF_FFFF
    assert place(config(5, seed=2), 3, 8000).seed == place(config(2), 3, 8000).seed


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1:8001"), ("::1", "http://[::1]:8001")], ids=["IPv4", "IPv6"]
)
def test_the_address(host: str, url: str) -> None:
    assert place(config(host=host), 1, 8001).url == url


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("ranks", "inherited", "gpus"),
    [
        (2, {}, ("2", "3")),
        (0, {}, ("0", "1")),
        (None, {}, ("1", "2")),
        (None, {"LOCAL_WORLD_SIZE": "2"}, ("2", "3")),
        (2, {"CUDA_VISIBLE_DEVICES": "7,5,GPU-a,GPU-b"}, ("GPU-a", "GPU-b")),
    ],
)
def test_engines_get_the_gpus_after_those_of_the_ranks(
    ranks: int | None, inherited: dict[str, str], gpus: tuple[str, ...]
) -> None:
    two = [place(config(count=2), index, 8000, ranks, inherited) for index in (0, 1)]
    assert two[0].gpus + two[1].gpus == gpus
    assert place(config(tensor_parallel=2), 0, 8000, ranks, inherited).gpus == gpus


@pytest.mark.usefixtures("four_gpus")
def test_engines_never_get_the_gpus_of_the_ranks() -> None:
    with pytest.raises(ConfigError, match=r"ranks\(3\) \+ engine.count\(2\) x .*\(1\) = 5 GPUs, but 4 are visible"):
        place(config(count=2), 0, 8000, inherited={"LOCAL_WORLD_SIZE": "3"})


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("ranks", "inherited", "gpus"),
    [
        (4, {}, ("0", "1")),
        (2, {}, ("0", "1")),
        (None, {"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "7,5,GPU-a,GPU-b"}, ("7", "5")),
        (3, {"CUDA_VISIBLE_DEVICES": "GPU-a, MIG-b,MIG-GPU-c/3/0,1"}, ("GPU-a", "MIG-b")),
    ],
)
def test_colocated_engines_get_the_gpus_of_the_ranks(
    ranks: int | None, inherited: dict[str, str], gpus: tuple[str, ...]
) -> None:
    two = [place(config(count=2, placement="colocated"), index, 8000, ranks, inherited) for index in (0, 1)]
    assert two[0].gpus + two[1].gpus == gpus
    assert place(config(tensor_parallel=2, placement="colocated"), 0, 8000, ranks, inherited).gpus == gpus


@pytest.mark.usefixtures("four_gpus")
def test_the_share_of_a_gpu_depends_on_whether_a_rank_has_it_too() -> None:
    def share(ranks: int, **engine: Any) -> float:
        return place(config(**engine), 0, 8000, ranks).memory_fraction

    assert (share(1), share(1, placement="colocated", sleep=False)) == (0.85, 0.4)
    assert share(1, placement="colocated") == 0.6, "it sleeps while the rank needs the rest"
    assert share(0, placement="colocated") == 0.85, "an evaluation has no ranks"
    assert not place(config(placement="colocated"), 0, 8000, 0).sleeps, "nor does it sleep for anybody"
    assert share(1, memory_fraction=0.3) == share(1, placement="colocated", memory_fraction=0.3) == 0.3


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("ranks", "engine", "message"),
    [
        (
            1,
            {"count": 2},
            r"count\(2\) x .*\(1\) = 2 GPUs, but engine.placement=colocated .* own ranks, and there are 1",
        ),
        (2, {"count": 2, "tensor_parallel": 2}, r"count\(2\) x .*\(2\) = 4 GPUs, .* and there are 2"),
        (5, {}, "5 ranks on this machine need a GPU each, but 4 are visible; start at most 4 there"),
    ],
)
def test_colocated_engines_have_no_gpus_but_those_of_the_ranks(
    ranks: int, engine: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        place(config(placement="colocated", **engine), 0, 8000, ranks)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)


SLURM = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "3"}
"""Four tasks on a machine, each of which sees one GPU, as its own."""


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("name", ["3", "GPU-5f1c", "MIG-8e2d"])
def test_a_rank_that_sees_one_gpu_shares_that_one(name: str) -> None:
    inherited = SLURM | {"CUDA_VISIBLE_DEVICES": name}
    assert place(config(placement="colocated"), 0, 8000, inherited=inherited).gpus == (name,)


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("engine", [{"count": 2}, {"tensor_parallel": 2}])
def test_a_rank_that_sees_one_gpu_cannot_give_away_those_of_others(engine: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"= 2 GPUs, but each of the 4 ranks on this machine sees only its own"):
        place(config(placement="colocated", **engine), 0, 8000, inherited=SLURM)


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("launcher", [{}, {"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}], ids=["cli", "torchrun"])
def test_two_ranks_do_not_share_a_gpu(launcher: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"2 ranks on this machine need a GPU each, but 1 are visible"):
        place(config(placement="colocated"), 0, 8000, ranks=2, inherited=launcher)


@pytest.mark.usefixtures("one_gpu")
def test_one_gpu_is_enough_for_a_rank_and_an_engine_that_share_it() -> None:
    with pytest.raises(ConfigError, match=r"ranks\(1\) \+ .* = 2 GPUs, but 1 are visible .*engine.placement=colocated"):
        place(config(), 0, 8000, inherited={})
    assert place(config(placement="colocated"), 0, 8000, inherited={}).gpus == ("0",)


@pytest.mark.usefixtures("four_gpus")
def test_engines_that_run_elsewhere_need_no_gpus_here() -> None:
    there = config(placement="external", urls=["http://a:1", "http://b:2"], tensor_parallel=8)
    assert check_gpus(there.engine, 4, {}) == 4
    with pytest.raises(ConfigError, match="5 ranks on this machine need a GPU each, but 4 are visible"):
        check_gpus(there.engine, 5, {})
    assert [elsewhere(there, index).url for index in (0, 1)] == there.engine.urls
    assert elsewhere(config(placement="external", urls=["http://[::1]:81"]), 0).url == "http://[::1]:81"


def test_on_cpu_there_is_nothing_to_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert place(config(placement="colocated", count=2), 1, 8000, ranks=1).gpus == ()
