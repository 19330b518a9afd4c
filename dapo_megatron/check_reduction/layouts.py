"""Names the layouts of ranks that are checked: the standard ones, and that of the user's configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dapo_megatron.config import ParallelConfig
from dapo_megatron.errors import ConfigError

OWN = "yours"
"""The name of the configuration's own layout."""

_SIZES: dict[str, dict[str, Any]] = {
    "1": {},
    "dp2": {"dp": 2},
    "dp2+dist-opt": {"dp": 2, "distributed_optimizer": True},
    "dp2+dist-opt+overlap": {"dp": 2, "distributed_optimizer": True, "overlap_grad_reduce": True},
    "tp2": {"tp": 2},
    "tp2+sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2+vpp2": {"pp": 2, "vpp": 2},
    "cp2": {"cp": 2},
    "tp2xpp2": {"tp": 2, "pp": 2},
    "tp2xcp2": {"tp": 2, "cp": 2},
    "pp2xcp2": {"pp": 2, "cp": 2},
    "dp2xtp2": {"dp": 2, "tp": 2},
    "dp2xcp2": {"dp": 2, "cp": 2},
    "tp2xcp2+sp": {"tp": 2, "cp": 2, "sequence_parallel": True},
    "dp2xpp2+vpp2+dist-opt+overlap": {
        "dp": 2,
        "pp": 2,
        "vpp": 2,
        "distributed_optimizer": True,
        "overlap_grad_reduce": True,
    },
    "dp2+ep2": {"dp": 2, "ep": 2},
    "dp4+ep2+dist-opt": {"dp": 4, "ep": 2, "distributed_optimizer": True},
    "dp2xpp2+ep2+dist-opt+overlap": {
        "dp": 2,
        "pp": 2,
        "ep": 2,
        "distributed_optimizer": True,
        "overlap_grad_reduce": True,
    },
    "tp2xcp2+ep2+sp": {"tp": 2, "cp": 2, "ep": 2, "sequence_parallel": True},
}

_FLAGS = {
    "sp": "sequence_parallel",
    "dist-opt": "distributed_optimizer",
    "overlap": "overlap_grad_reduce",
    "param-overlap": "overlap_param_gather",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """How ranks share the work.

    >>> STANDARD["tp2xcp2+sp"].ranks
    4
    """

    name: str
    dp: int
    parallel: ParallelConfig

    @property
    def ranks(self) -> int:
        return self.dp * self.parallel.model_size

    @classmethod
    def own(cls, parallel: ParallelConfig, ranks: int) -> Layout:
        """Return that of a configuration which `dapo-megatron train` starts on `ranks` ranks.

        With a single one, torchrun decides on their number, and there are two copies of the model, or more where more
        share out its experts.

        Raises:
            ConfigError: where the ranks do not divide among copies of the model.
        """
        least = math.lcm(2 * parallel.cp, parallel.ep) // parallel.cp
        copies = parallel.data_parallel(ranks) if ranks > 1 or parallel.model_size * parallel.ep == 1 else least
        return cls(OWN, copies, parallel)

    def fitted(self, limit: int) -> Layout:
        """Halve the axes of this one, the largest first, until `limit` ranks are enough."""
        sizes = {"dp": self.dp, **{axis: getattr(self.parallel, axis) for axis in ("pp", "cp", "tp")}}
        while math.prod(sizes.values()) > limit:
            largest = max(sizes, key=lambda axis: sizes[axis])
            sizes[largest] //= 2
        dp = sizes.pop("dp")
        vpp = min(self.parallel.vpp, 2) if sizes["pp"] > 1 else 1
        shared = self.parallel.sequence_parallel and sizes["tp"] > 1
        ep = math.gcd(self.parallel.ep, dp * sizes["cp"])
        parallel = self.parallel.model_copy(update={**sizes, "vpp": vpp, "ep": ep, "sequence_parallel": shared})
        return Layout(self.name, dp, parallel)

    def __str__(self) -> str:
        return f"{OWN}: {self.sizes}" if self.name == OWN else self.name

    @property
    def sizes(self) -> str:
        """How many ranks share what, spelled as in the names of the standard layouts."""
        sizes = {"dp": self.dp, **{axis: getattr(self.parallel, axis) for axis in ("tp", "pp", "cp")}}
        axes = "x".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1) or "1"
        flags = [flag for flag, name in _FLAGS.items() if getattr(self.parallel, name)]
        flags[:0] = [f"{axis}{size}" for axis in ("vpp", "ep") if (size := getattr(self.parallel, axis)) > 1]
        return "+".join([axes, *flags])


def _standard(dp: int = 1, **sizes: Any) -> tuple[int, ParallelConfig]:
    return dp, ParallelConfig(**{"distributed_optimizer": False, **sizes})


STANDARD = {name: Layout(name, *_standard(**sizes)) for name, sizes in _SIZES.items()}
"""Layouts by name."""


def choose(names: Sequence[str] | None, own: Layout, limit: int) -> list[Layout]:
    """Return the layouts of these names, each once, or the standard ones after the configuration's own.

    Args:
        own: the configuration's own, `fitted`.

    Raises:
        ConfigError: for an unknown name, or that of a layout that wants more than `limit` ranks.
    """
    if names is None:
        return [own, *(layout for name, layout in STANDARD.items() if name != own.sizes)]
    known = {OWN: own, **STANDARD}
    chosen = []
    for name in (name.strip().lower() for name in names):
        if name not in known:
            raise ConfigError(
                f"--layouts: {name!r} is not one of {', '.join(known)}; say others in the configuration, such as "
                f"parallel.tp=4 parallel.cp=4 launch.processes=16 --layouts {OWN} --processes 16"
            )
        layout = known[name]
        if layout.ranks > limit:
            raise ConfigError(
                f"--layouts: {layout} wants {layout.ranks} ranks, but --processes allows {limit}; raise it (on GPUs, "
                f"up to their number) or leave that layout out"
            )
        chosen.append(layout)
    return list(dict.fromkeys(chosen))
