"""Where engines run: the address, the GPUs and the seed of each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

from dapo_megatron.config import Config, EngineConfig
from dapo_megatron.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Place:
    """What one engine has of this machine.

    >>> place = Place(index=1, host="127.0.0.1", port=8001, gpus=("2", "3"), seed=1_846_271_305)
    >>> place.name, place.url
    ('engine 1', 'http://127.0.0.1:8001')
    """

    index: int
    """Counts the engines of a run from 0."""
    host: str
    port: int
    gpus: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them; none where the engine runs on CPU."""
    seed: int
    """For its sampling, below 2**31. Every engine has another."""

    @property
    def name(self) -> str:
        return f"engine {self.index}"

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def place(
    config: Config, index: int, port: int, ranks: int | None = None, inherited: Mapping[str, str] = os.environ
) -> Place:
    """The place of engine `index`, on the GPUs after those of the ranks and of the engines before it.

    Args:
        ranks: ranks on this machine, each with a GPU of its own; None asks torchrun's variables in `inherited`.

    Raises:
        ConfigError: as `check_gpus`.
    """
    engine = config.engine
    ranks = int(inherited.get("LOCAL_WORLD_SIZE", "1")) if ranks is None else ranks
    count = check_gpus(engine, ranks)
    gpus = (inherited.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",") if count else []
    first = ranks + index * engine.tensor_parallel
    seed = config.train.seed if engine.seed is None else engine.seed
    return Place(index, engine.host, port, tuple(gpus[first : first + engine.tensor_parallel]), _seed(seed, index))


def check_gpus(engine: EngineConfig, ranks: int) -> int:
    """The number of GPUs of this machine, as many as this process sees.

    Args:
        ranks: on this machine, each with a GPU of its own.

    Raises:
        ConfigError: where there are GPUs, but fewer than ranks and engines together need.
    """
    # torch is what ranks and engines count with: it heeds CUDA_VISIBLE_DEVICES and containers, which nvidia-smi does
    # not, finds none where its build has no use for them, and only asks the driver.
    import torch

    count = torch.cuda.device_count()
    needed = ranks + engine.count * engine.tensor_parallel
    if 0 < count < needed:
        raise ConfigError(
            f"engine: ranks({ranks}) + engine.count({engine.count}) x engine.tensor_parallel"
            f"({engine.tensor_parallel}) = {needed} GPUs, but {count} are visible on this machine; ranks and engines "
            f"do not share GPUs, and all engines run on the machine of rank 0: start fewer ranks there, or fewer or "
            f"smaller engines"
        )
    return count


def _seed(seed: int, index: int) -> int:
    """31 bits of a hash: seeds made by adding would give neighbouring runs each other's streams."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFF_FFFF
