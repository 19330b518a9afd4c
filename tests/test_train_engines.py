"""An actor in tensor and pipeline parallel trains, and its weights go to engines of each kind and number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers.sglang import STARTUP_SECONDS, needs_sglang
from tests.test_train import rows, run, write_material

pytestmark = [pytest.mark.vllm, pytest.mark.multiproc, pytest.mark.long, pytest.mark.timeout(STARTUP_SECONDS + 600)]

FOUR_RANKS = ("launch.processes=4", "parallel.tp=2", "parallel.pp=2", "train.steps=3", "eval.data=null")
TOLERANCE = 2e-5


def assert_engines_follow(folder: Path) -> None:
    """Each step is sampled, and the canary answered, with the weights that the one before has made."""
    steps = rows(folder)
    assert len(steps) == 3
    for row in steps:
        assert row["mismatch/abs_max"] <= TOLERANCE and 0 < row["verify/canary_max"] <= TOLERANCE
        assert row["grad_norm"] > 0 and row["engine/restarts"] == 0


VLLM = {"one": ["engine.count=1"], "two": ["engine.count=2"], "tp2": ["engine.tensor_parallel=2"]}
SGLANG = pytest.param(["engine.kind=sglang", "engine.stall_seconds=240"], "gloo", id="sglang", marks=needs_sglang)


@pytest.mark.parametrize(
    ("engines", "transport"),
    [
        *(pytest.param(words, by, id=f"{name}-{by}") for name, words in VLLM.items() for by in ("gloo", "disk")),
        SGLANG,
    ],
)
def test_engines_follow(tmp_path: Path, engines: Sequence[str], transport: str) -> None:
    words = [*FOUR_RANKS, *engines, f"weights.transport={transport}"]
    done = run(write_material(tmp_path / "material"), tmp_path, *words, limit_seconds=STARTUP_SECONDS + 400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_engines_follow(tmp_path)
