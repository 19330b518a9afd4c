from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from dapo_megatron.config import ParallelConfig

if TYPE_CHECKING:
    from dapo_megatron.actor.topology import Topology


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests that `make test` leaves out, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped, with the reason, where there is none; long ones have a target of their own."""
    if not config.getoption("--long"):
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing:
        import torch

        if not torch.cuda.is_available():
            for item in needing:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(scope="session", autouse=True)
def functions_chosen() -> None:
    """A model that a test compares with is no exception, wherever it is the first to need them."""
    if "torch" in sys.modules:
        from dapo_megatron.mkl import choose_functions

        choose_functions()


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Processes that a test starts heed signals as at a terminal, also where the tests run behind `&` or `nohup`.

    A signal that is ignored stays so in a new program; one that has a handler, which outlives a logout, does not.
    """
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: lambda number, frame: None}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def alone() -> Iterator[Topology]:
    """A process group of this process only."""
    from dapo_megatron.actor import topology

    yield topology.initialize(ParallelConfig())
    topology.shutdown()
