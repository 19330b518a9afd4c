"""Who is where, for people: printed before anything is started."""

from __future__ import annotations

from dapo_megatron.config import Config
from dapo_megatron.rollout.place import leader_address, place

_SHOWN = 8
"""Engines that have a line of their own."""


def plan(config: Config, ranks: int) -> tuple[str, ...]:
    """A line for all engines, and one for each where it says more.

    Args:
        ranks: on this machine.

    Raises:
        ConfigError: as `place` and `leader_address`.
    """
    engine = config.engine
    if engine.urls:
        where, each = "run already", [f"{url}" for url in engine.urls]
    else:
        gpus = [place(config, index, 0, ranks).gpus for index in range(engine.count)]
        where = "on this machine" + (", " + _beside(config, ranks) if gpus[0] else ", on CPU")
        each = [f"GPU {','.join(own)}" for own in gpus if own]
    number = f"{engine.count} engine{'s' if engine.count > 1 else ''}"
    sizes = f"{engine.kind}, tensor parallel {engine.tensor_parallel}"
    way = f"weights by {config.weights.transport} from {leader_address(engine)}"
    lines = [f"{number} ({sizes}) {where}; {way}"]
    lines += [f"  engine {index}: {what}" for index, what in enumerate(each[:_SHOWN])]
    return (*lines, *([f"  and {len(each) - _SHOWN} more"] if len(each) > _SHOWN else []))


def _beside(config: Config, ranks: int) -> str:
    number = f"{ranks} rank{'s' if ranks > 1 else ''}"
    if config.engine.placement == "colocated":
        return f"on the GPUs of its {number}" + (", in turns" if config.engine.sleeps else "")
    return f"beside the GPUs of its {number}" if ranks else "which trains nothing"
