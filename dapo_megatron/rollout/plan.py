"""Who is where, for people: printed before anything is started."""

from __future__ import annotations

from collections.abc import Sequence

from dapo_megatron.config import Config
from dapo_megatron.rollout.nodes import Nodes
from dapo_megatron.rollout.place import Place, leader_address, place

_SHOWN = 8
"""Engines, or nodes, that have a line of their own."""


def plan(config: Config, ranks: int, nodes: Nodes | None = None) -> tuple[str, ...]:
    """A line for all engines, and one for each where it says more; over several nodes, one for each of these.

    Args:
        ranks: on this machine.
        nodes: where the run may start engines on other machines, too.

    Raises:
        ConfigError: as `place` and `leader_address`.
    """
    engine = config.engine
    if nodes and nodes.others:
        where, each = _over_nodes(nodes, ranks)
    elif engine.urls:
        where, each = "run already", [f"engine {index}: {url}" for index, url in enumerate(engine.urls)]
        if engine.kinds:
            each = [f"{line}, {kind}" for line, kind in zip(each, engine.kinds, strict=True)]
    else:
        gpus = [place(config, index, 0, ranks).gpus for index in range(engine.count)]
        where = "on this machine" + (", " + _beside(config, ranks) if gpus[0] else ", on CPU")
        each = [f"engine {index}: GPU {','.join(own)}" for index, own in enumerate(gpus) if own]
    number = f"{engine.count} engine{'s' if engine.count > 1 else ''}"
    sizes = f"{' and '.join(sorted(set(engine.kinds or [engine.kind])))}, tensor parallel {engine.tensor_parallel}"
    address = leader_address(engine, nodes.addresses if nodes else ())
    source = "the ranks on the same GPUs" if config.weights.transport == "ipc" else address
    way = f"weights by {config.weights.transport} from {source}"
    lines = [f"{number} ({sizes}) {where}; {way}"]
    lines += [f"  {line}" for line in each[:_SHOWN]]
    return (*lines, *([f"  and {len(each) - _SHOWN} more"] if len(each) > _SHOWN else []))


def _over_nodes(nodes: Nodes, ranks: int) -> tuple[str, list[str]]:
    """Where all engines are, and a line for each node that has some."""
    here = [place(nodes.here, index, 0, ranks) for index in range(nodes.here.engine.count)]
    lines = [_line("node 0, this machine", ranks, here)] if here else []
    lines += [_line(f"{node.name}, {node.address}", node.ranks, node.places) for node in nodes.others]
    shared = nodes.here.engine.placement == "colocated"
    beside = f"{'on' if shared else 'beside'} the GPUs of their ranks" if nodes.others[0].places[0].gpus else "on CPU"
    return f"on {len(lines)} of {nodes.count} nodes, {beside}", lines


def _line(name: str, ranks: int, places: Sequence[Place]) -> str:
    engines = [where.name + (f" on GPU {','.join(where.gpus)}" if where.gpus else "") for where in places]
    return f"{name}: {ranks} rank{'s' if ranks > 1 else ''}, {'; '.join(engines)}"


def _beside(config: Config, ranks: int) -> str:
    number = f"{ranks} rank{'s' if ranks > 1 else ''}"
    if config.engine.placement == "colocated":
        return f"on the GPUs of its {number}" + (", in turns" if config.engine.sleeps else "")
    return f"beside the GPUs of its {number}" if ranks else "which trains nothing"
