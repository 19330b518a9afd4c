"""Layouts by name: tp2, dp2xcp2, tp2+sp, pp2+vpp2, dp2+dist-opt+overlap; 1 is a single rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from dapo_megatron.config import ParallelConfig
from dapo_megatron.errors import ConfigError

STANDARD = (
    "1",
    "dp2",
    "dp2+dist-opt",
    "dp2+dist-opt+overlap",
    "tp2",
    "tp2+sp",
    "pp2",
    "pp2+vpp2",
    "cp2",
    "tp2xpp2",
    "tp2xcp2",
    "pp2xcp2",
    "dp2xtp2",
    "dp2xcp2",
    "tp2xcp2+sp",
    "dp2xpp2+vpp2+dist-opt+overlap",
)
OWN = "yours"
"""The name of the configuration's own layout."""

_FLAGS = {"sp": "sequence_parallel", "dist-opt": "distributed_optimizer", "overlap": "overlap_grad_reduce"}


@dataclass(frozen=True, slots=True)
class Layout:
    """How ranks share the work.

    >>> Layout.parse("dp2xtp2+sp").ranks
    4
    """

    name: str
    dp: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def ranks(self) -> int:
        return self.dp * self.parallel.model_size

    @classmethod
    def parse(cls, name: str) -> Layout:
        """Read a name.

        Raises:
            ConfigError: for what is no layout, saying what one looks like.
        """
        values: dict[str, Any] = dict.fromkeys(_FLAGS.values(), False)
        for word in re.split(r"[x+]", name.strip().lower()):
            if axis := re.fullmatch(r"(dp|tp|pp|cp|vpp)([1-9]\d*)", word):
                values[axis[1]] = int(axis[2])
            elif word in _FLAGS:
                values[_FLAGS[word]] = True
            elif word != "1":
                raise ConfigError(
                    f"--layouts: {word!r} in {name!r} is neither an axis (dp, tp, pp, cp, vpp) with its size nor one "
                    f"of {', '.join(_FLAGS)}; a layout looks like {', '.join(STANDARD[2:8:2])} or {STANDARD[-2]}"
                )
        dp = values.pop("dp", 1)
        try:
            return cls(name, dp, ParallelConfig(**values))
        except ValidationError as error:
            problems = "; ".join(str(issue["ctx"]["error"]) for issue in error.errors() if "ctx" in issue)
            raise ConfigError(f"--layouts: {name!r} cannot be: {problems}") from error

    @classmethod
    def own(cls, parallel: ParallelConfig, ranks: int, limit: int) -> Layout:
        """That of a configuration with so many ranks, its axes halved, the largest first, until `limit` are enough."""
        sizes = {
            "dp": max(1, ranks // parallel.model_size),
            "pp": parallel.pp,
            "cp": parallel.cp,
            "tp": parallel.tp,
        }
        while sizes["dp"] * sizes["tp"] * sizes["pp"] * sizes["cp"] > limit:
            largest = max(sizes, key=lambda axis: sizes[axis])
            sizes[largest] //= 2
        dp = sizes.pop("dp")
        vpp = min(parallel.vpp, 2) if sizes["pp"] > 1 else 1
        shared = parallel.sequence_parallel and sizes["tp"] > 1
        return cls(OWN, dp, parallel.model_copy(update={**sizes, "vpp": vpp, "sequence_parallel": shared}))

    def __str__(self) -> str:
        return f"{OWN}: {self.sizes}" if self.name == OWN else self.name

    @property
    def sizes(self) -> str:
        """The name of a layout of these sizes."""
        sizes = {"dp": self.dp, **{axis: getattr(self.parallel, axis) for axis in ("tp", "pp", "cp")}}
        axes = "x".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1) or "1"
        flags = [flag for flag, name in _FLAGS.items() if getattr(self.parallel, name)]
        if self.parallel.vpp > 1:
            flags.insert(0, f"vpp{self.parallel.vpp}")
        return "+".join([axes, *flags])


def choose(names: Sequence[str] | None, parallel: ParallelConfig, ranks: int, limit: int) -> list[Layout]:
    """The layouts of these names, or the standard ones after the configuration's own.

    Raises:
        ConfigError: for a name that is none, or that wants more than `limit` ranks.
    """
    own = Layout.own(parallel, ranks, limit)
    if names is None:
        return [own, *(Layout.parse(name) for name in STANDARD if name != own.sizes)]
    chosen = [own if name == OWN else Layout.parse(name) for name in names]
    for layout in chosen:
        if layout.ranks > limit:
            raise ConfigError(
                f"--layouts: {layout} wants {layout.ranks} ranks, but --processes allows {limit}; raise it (on GPUs, "
                f"up to their number) or leave that layout out"
            )
    return chosen
