"""An actor that nobody holds is gone, with its process groups and their threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dapo_megatron.actor.weakly import weakly
from tests.helpers.distributed import run_distributed
from tests.helpers.models import make_config, save_qwen2


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def build_an_actor(model: Path, parallel: dict[str, Any]) -> tuple[int, int]:
    """Return the threads of this process before it and with it."""
    from dapo_megatron.actor import topology
    from dapo_megatron.actor.actor import Actor
    from dapo_megatron.weights.hf import HfCheckpoint

    before = threads()
    config = make_config(model, parallel=parallel)
    topo = topology.initialize(config.parallel)
    actor = Actor(config, topo, HfCheckpoint(model))
    during = threads()
    topology.shutdown()
    del actor
    return before, during


@pytest.mark.multiproc
def test_actors_leave_no_threads_behind(tmp_path: Path) -> None:
    model = save_qwen2(tmp_path / "model", layers=4)
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    layouts: list[dict[str, Any]] = [{}, overlap, {"pp": 2, "vpp": 2, **overlap}, {}]
    counts = [run_distributed(build_an_actor, 2, model, parallel)[0] for parallel in layouts]
    assert all(during > before + 30 for before, during in counts)
    assert counts[-1][0] <= counts[1][0] + 3


def test_a_method_of_what_is_gone_is_not_called() -> None:
    class Thing:
        def double(self, number: int) -> int:
            return 2 * number

    thing = Thing()
    double = weakly(thing.double)
    assert double(4) == 8
    del thing
    with pytest.raises(AssertionError, match="double is called after its object is gone"):
        double(4)
