"""What of a push need not be sent, because the engines have it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

_LAYER = re.compile(r"(.*?\.\d+)\.")


def layer_of(name: str) -> str:
    """Return the layer of a tensor, or its own name where it is in none.

    >>> layer_of("model.layers.3.mlp.experts.7.up_proj.weight"), layer_of("model.norm.weight")
    ('model.layers.3', 'model.norm.weight')
    """
    found = _LAYER.match(name)
    return found[1] if found else name


class Delta:
    """Compares tensors, by checksum, with the last push that all engines of a group have confirmed.

    Engines make new parameters of several tensors (queries, keys and values; all experts), so a layer in which any
    tensor has changed is sent whole. Whether one has shows only when all of it has come by. So tensors of a layer that
    come before the first that has changed may be gone by then, if it is larger than a bucket: they are `late`.

    Args:
        active: otherwise everything counts as changed.
    """

    def __init__(self, active: bool) -> None:
        self._active = active
        self._before: dict[str, int] = {}
        self._confirmed: dict[str, int] = {}
        self.begin()

    def begin(self) -> None:
        """A push begins. If it is not confirmed, engines may have anything."""
        self._before, self._confirmed = self._confirmed, {}
        self.sums: dict[str, int] = {}
        """Of every tensor that has come by in this push."""
        self._changed: set[str] = set()
        self._left: defaultdict[str, list[str]] = defaultdict(list)

    def seen(self, name: str, checksum: int) -> bool:
        """Take note of a tensor. Returns whether its layer is known to have changed."""
        self.sums[name] = checksum
        if not self._active or self._before.get(name) != checksum:
            self._changed.add(layer_of(name))
        return layer_of(name) in self._changed

    def leave_out(self, names: Iterable[str]) -> None:
        """Take note of tensors that are not sent."""
        for name in names:
            self._left[layer_of(name)].append(name)

    @property
    def late(self) -> list[str]:
        """Tensors that were left out of layers that have changed."""
        return [name for layer, names in self._left.items() if layer in self._changed for name in names]

    @property
    def kept(self) -> list[str]:
        """Tensors of layers that have not changed."""
        return [name for layer, names in self._left.items() if layer not in self._changed for name in names]

    def confirm(self) -> None:
        """All engines have what has come by."""
        self._confirmed = self.sums
