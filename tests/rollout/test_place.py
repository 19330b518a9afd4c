from __future__ import annotations

from typing import Any

import pytest

from dapo_megatron.config import Config
from dapo_megatron.config_file import parse
from dapo_megatron.errors import ConfigError
from dapo_megatron.rollout.place import place


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
