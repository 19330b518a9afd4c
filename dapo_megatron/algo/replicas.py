"""The seam to the other data-parallel replicas of a run, each of which holds a part of every mini-batch."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Replicas(Protocol):
    """Reductions over replicas, each counted once; with a single replica, the identity.

    They are collective: all ranks of all replicas make the same calls, in the same order, with tensors of the same
    shape and dtype, which ranks of one replica hold alike. All get the same result. Tensors lie in host memory.
    """

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum, a new tensor like `values`."""
        ...

    def max(self, values: Tensor) -> Tensor:
        """Return the largest of each entry, a new tensor like `values`, which are floating."""
        ...
