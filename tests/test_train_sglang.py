"""A whole run from the command line with SGLang: real ranks, a real engine, live weight pushes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.sglang import STARTUP_SECONDS, needs_sglang
from tests.test_train import rows, run, write_material

pytestmark = [*needs_sglang, pytest.mark.multiproc, pytest.mark.timeout(STARTUP_SECONDS + 300)]


def test_a_run_trains_and_the_engine_follows(tmp_path: Path) -> None:
    material = write_material(tmp_path / "material")
    engine = ["engine.kind=sglang", "engine.stall_seconds=120"]
    done = run(material, tmp_path, *engine, limit_seconds=STARTUP_SECONDS + 240)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = rows(tmp_path)
    # The engine samples the second step with the weights that the first one made.
    for row in (first, second):
        assert row["mismatch/abs_max"] <= 2e-5
        assert 0 < row["verify/canary_max"] <= 2e-5
        assert row["grad_norm"] > 0 and row["engine/restarts"] == 0
    before = load_file(material / "base/model.safetensors")
    after = load_file(tmp_path / "run/hf/model.safetensors")
    assert all(not before[name].equal(after[name]) for name in before)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert set(summary) >= {"base_accuracy", "final_accuracy", "seconds"}
    assert "sglang" in (tmp_path / "run/config.yaml").read_text()
