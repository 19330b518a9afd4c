"""Where engines run: the address, the GPUs and the seed of each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from dapo_megatron.config import Config, EngineConfig
from dapo_megatron.errors import ConfigError
from dapo_megatron.routes import address_for

_OF_ITS_OWN_GPU = 0.85
_OF_A_SHARED_GPU = 0.4
OF_A_GPU_IN_TURNS = 0.6
"""The share of a GPU's memory that an engine has where the configuration does not say. The last one leaves room for a
rank's context, its parameters, which are there when the KV cache wakes for the canary, and a layer that is loaded."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one engine answers, and what it has of this machine where it runs here.

    >>> place = Place(1, "127.0.0.1", port=8001, gpus=("2", "3"), memory_fraction=0.85, seed=1_846_271_305)
    >>> place.name, place.url
    ('engine 1', 'http://127.0.0.1:8001')
    """

    index: int
    """Counts the engines of a run from 0."""
    host: str
    port: int
    gpus: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them; none where the engine runs on CPU, or elsewhere."""
    memory_fraction: float
    """Its share of the memory of each of them."""
    seed: int
    """For its sampling, below 2**31. Every engine has another."""
    sleeps: bool = False
    """Whether it gives its memory up now and then (engine.sleep)."""

    @property
    def name(self) -> str:
        return f"engine {self.index}"

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def place(
    config: Config, index: int, port: int, ranks: int | None = None, inherited: Mapping[str, str] = os.environ
) -> Place:
    """The place of engine `index`: engines lie side by side on GPUs, from the first one on that is for engines.

    Args:
        ranks: ranks on this machine, each with a GPU of its own; None asks torchrun's variables in `inherited`.

    Raises:
        ConfigError: as `check_gpus`.
    """
    engine = config.engine
    ranks = int(inherited.get("LOCAL_WORLD_SIZE", "1")) if ranks is None else ranks
    count = check_gpus(engine, ranks, inherited)
    gpus = (inherited.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",") if count else []
    shared = _shared(engine, ranks)
    sleeps = shared and engine.sleeps
    of_shared = OF_A_GPU_IN_TURNS if sleeps else _OF_A_SHARED_GPU
    first = (0 if shared else ranks) + index * engine.tensor_parallel
    return Place(
        index=index,
        host=engine.host,
        port=port,
        gpus=tuple(gpu.strip() for gpu in gpus[first : first + engine.tensor_parallel]),
        memory_fraction=engine.memory_fraction or (of_shared if shared else _OF_ITS_OWN_GPU),
        seed=seed_of(config, index),
        sleeps=sleeps,
    )


def elsewhere(config: Config, index: int) -> Place:
    """The place of an engine that runs already."""
    parts = urlsplit(config.engine.urls[index])
    assert parts.hostname and parts.port
    return Place(index, parts.hostname, parts.port, gpus=(), memory_fraction=0.0, seed=0)


def leader_address(engine: EngineConfig, nodes: Sequence[str] = ()) -> str:
    """The address of this machine at which engines reach it: loopback, where they are all here.

    Args:
        nodes: addresses of other machines on which the run starts engines.

    Raises:
        ConfigError: where there is no way to one of them, or there is no such address.
    """
    hosts = [*(urlsplit(url).hostname or "" for url in engine.urls), *nodes]
    key = "engine.nodes" if nodes else "engine.urls"
    try:
        addresses = address_for(hosts)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{key}: there is no way from here to one of {', '.join(hosts)}: {error}") from error
    if len(addresses) > 1:
        raise ConfigError(
            f"{key}: ways to {', '.join(hosts)} go by {len(addresses)} addresses of this machine, "
            f"{', '.join(sorted(addresses))}, but weights are sent from one; name all engines by addresses of "
            f"one network"
        )
    return addresses.pop()


def check_gpus(engine: EngineConfig, ranks: int, inherited: Mapping[str, str] = os.environ) -> int:
    """The number of GPUs of this machine, as many as this process sees.

    Args:
        ranks: on this machine, each with a GPU of its own; 0 where nothing is trained.

    Raises:
        ConfigError: where there are GPUs, but fewer than ranks and engines need, or engines need others than those of
            the ranks that they are to share.
    """
    # torch is what ranks and engines count with: it heeds CUDA_VISIBLE_DEVICES and containers, which nvidia-smi does
    # not, finds none where its build has no use for them, and only asks the driver.
    import torch

    count = torch.cuda.device_count()
    wanted = 0 if engine.urls else engine.count * engine.tensor_parallel
    sizes = f"engine.count({engine.count}) x engine.tensor_parallel({engine.tensor_parallel})"
    if not count:
        return 0
    if not wanted:
        _check_ranks(count, ranks, inherited)
    elif not _shared(engine, ranks):
        if count < ranks + wanted:
            share = ", or let engines run on the ranks' own GPUs with engine.placement=colocated" if ranks else ""
            raise ConfigError(
                f"engine: ranks({ranks}) + {sizes} = {ranks + wanted} GPUs, but {count} are visible on this machine; "
                f"with engine.placement=split ranks and engines do not share GPUs: start fewer ranks there, fewer or "
                f"smaller engines, or some of them on other machines (engine.nodes){share}"
            )
    elif wanted > ranks:
        raise ConfigError(
            f"engine: {sizes} = {wanted} GPUs, but engine.placement=colocated puts engines on the GPUs of a machine's "
            f"own ranks, and there are {ranks}; start more ranks there, or fewer or smaller engines"
        )
    elif _sees_only_its_own(count, inherited):
        if wanted > 1:
            raise ConfigError(
                f"engine: {sizes} = {wanted} GPUs, but each of the {ranks} ranks on this machine sees only its own, "
                f"and rank 0 starts the engines; let all ranks see all GPUs (Slurm: --gpus-per-node in place of "
                f"--gpus-per-task, or --gpu-bind=none), or have one engine with engine.tensor_parallel=1"
            )
    else:
        _check_ranks(count, ranks, inherited)
    return count


def _check_ranks(count: int, ranks: int, inherited: Mapping[str, str]) -> None:
    if count < ranks and not _sees_only_its_own(count, inherited):
        raise ConfigError(
            f"{ranks} ranks on this machine need a GPU each, but {count} are visible; start at most {count} there "
            f"(launch.processes, or torchrun's --nproc-per-node)"
        )


def _shared(engine: EngineConfig, ranks: int) -> bool:
    """Whether engines have their GPUs in common with ranks, of which there are none where nothing is trained."""
    return engine.placement == "colocated" and ranks > 0


def _sees_only_its_own(count: int, inherited: Mapping[str, str]) -> bool:
    """Whether this is a rank that was given one GPU, and the others theirs: Slurm can do that, torchrun does not."""
    return count == 1 and "LOCAL_RANK" in inherited and "TORCHELASTIC_RUN_ID" not in inherited


def seed_of(config: Config, index: int) -> int:
    """For the sampling of engine `index` of the run, 31 bits of a hash: seeds made by adding would give neighbouring
    runs each other's streams."""
    digest = hashlib.sha256(f"{config.sampling_seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFF_FFFF
