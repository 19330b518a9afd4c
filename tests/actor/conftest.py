from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from dapo_megatron.config import ParallelConfig

if TYPE_CHECKING:
    from dapo_megatron.actor.topology import Topology


@pytest.fixture
def alone() -> Iterator[Topology]:
    """A process group of this process only."""
    from dapo_megatron.actor import topology

    yield topology.initialize(ParallelConfig())
    topology.shutdown()
