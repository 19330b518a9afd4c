"""Layouts by name: tp2, dp2xcp2, tp2+sp, pp2+vpp2, dp2+dist-opt+overlap; 1 is a single rank."""

from __future__ import annotations

import math
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

_EXAMPLES = "1, dp2+dist-opt, tp2xcp2+sp or pp2+vpp2"
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
        name = re.sub(r"\s", "", name.lower())
        if not name:
            raise ConfigError(f"--layouts: a name is empty; a layout looks like {_EXAMPLES}")
        values: dict[str, Any] = {}
        for word in re.split(r"[x+]", name) if name != "1" else ():
            axis = re.fullmatch(r"(dp|tp|pp|cp|vpp)([1-9]\d*)", word)
            key = axis[1] if axis else _FLAGS.get(word)
            if key in values:
                raise ConfigError(f"--layouts: {name!r} says {key} twice")
            if key:
                values[key] = int(axis[2]) if axis else True
            else:
                raise ConfigError(
                    f"--layouts: {word!r} in {name!r} is neither an axis (dp, tp, pp, cp, vpp) with its size nor one "
                    f"of {', '.join(_FLAGS)}; a layout looks like {_EXAMPLES}"
                )
        dp = values.pop("dp", 1)
        try:
            return cls(name, dp, ParallelConfig(**{"distributed_optimizer": False, **values}))
        except ValidationError as error:
            problems = "; ".join(str(issue["ctx"]["error"]) for issue in error.errors() if "ctx" in issue)
            raise ConfigError(f"--layouts: {name!r} cannot be: {problems}") from error

    @classmethod
    def own(cls, parallel: ParallelConfig, ranks: int) -> Layout:
        """That of a configuration which `dapo-megatron train` starts on `ranks` ranks.

        With a single one, torchrun decides on their number, and there are two copies of the model.

        Raises:
            ConfigError: where the ranks do not divide among copies of the model.
        """
        copies = parallel.data_parallel(ranks) if ranks > 1 or parallel.model_size == 1 else 2
        return cls(OWN, copies, parallel)

    def fitted(self, limit: int) -> Layout:
        """This one, its axes halved, the largest first, until `limit` ranks are enough."""
        sizes = {"dp": self.dp, **{axis: getattr(self.parallel, axis) for axis in ("pp", "cp", "tp")}}
        while math.prod(sizes.values()) > limit:
            largest = max(sizes, key=lambda axis: sizes[axis])
            sizes[largest] //= 2
        dp = sizes.pop("dp")
        vpp = min(self.parallel.vpp, 2) if sizes["pp"] > 1 else 1
        shared = self.parallel.sequence_parallel and sizes["tp"] > 1
        parallel = self.parallel.model_copy(update={**sizes, "vpp": vpp, "sequence_parallel": shared})
        return Layout(self.name, dp, parallel)

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


def choose(names: Sequence[str] | None, own: Layout, limit: int) -> list[Layout]:
    """The layouts of these names, each once, or the standard ones after the configuration's own.

    Args:
        own: the configuration's, `fitted`.

    Raises:
        ConfigError: for a name that is none, or that wants more than `limit` ranks.
    """
    if names is None:
        return [own, *(Layout.parse(name) for name in STANDARD if name != own.sizes)]
    chosen = [own if name.strip().lower() == OWN else Layout.parse(name) for name in names]
    for layout in chosen:
        if layout.ranks > limit:
            raise ConfigError(
                f"--layouts: {layout} wants {layout.ranks} ranks, but --processes allows {limit}; raise it (on GPUs, "
                f"up to their number) or leave that layout out"
            )
    return list(dict.fromkeys(chosen))
