"""Whole runs in several layouts whose pushes go wrong: what every rank does, and what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dapo_megatron.obs.run_folder import AGAIN
from tests.helpers.jobs import ended, job
from tests.helpers.lives import metrics, steps_of
from tests.test_train_experts import make_config as experts

pytestmark = [pytest.mark.vllm, pytest.mark.multiproc, pytest.mark.long, pytest.mark.timeout(900)]

LIMIT_SECONDS = 400


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny model with experts, whose weights go through a folder."""
    return experts(tmp_path_factory.mktemp("run"))


def run(config: Path, scene: str, name: str, *overrides: str) -> tuple[int, str]:
    """Returns exit code and output of two ranks."""
    through = ["weights.transport=disk", f"run.name={name}", "run.existing=resume"]
    with job(config, scene, *through, *overrides, module="hurt_push") as process:
        output = ended(process, timeout=LIMIT_SECONDS)
    return process.returncode, output


LAYOUTS: dict[str, list[str]] = {
    "tp2": ["parallel.ep=1", "parallel.tp=2", "parallel.sequence_parallel=true"],
    "cp2": ["parallel.ep=1", "parallel.cp=2"],
    "ep2": ["parallel.ep=2"],
}


@pytest.mark.parametrize("layout", ["ep2", "tp2"])
def test_a_run_that_cannot_write_its_weights_saves_and_goes_on_later(config: Path, layout: str) -> None:
    name = f"full-{layout}"
    folder = config.parent / name
    code, output = run(config, "full:2", name, *LAYOUTS[layout])
    assert code == 1, output
    last = output.splitlines()[-1]
    assert last.startswith("dapo-megatron: error: cannot write the weights of version 1 to "), output
    assert "No space left on device" in last and last.endswith(": saved after 1 steps"), output
    assert "Traceback" not in output and not (folder / AGAIN).exists()
    assert [row["step"] for row in metrics(folder)] == [1]

    code, output = run(config, "full:100", name, *LAYOUTS[layout])
    assert code == 0, output
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3] and steps_of(folder) == [1]
    assert [path.name for path in (folder / "weights").glob("version-*")] == ["version-2"], "of the last step"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_two_engines_the_one_with_old_weights_is_named(config: Path, layout: str) -> None:
    """By the canary, in whatever layout the actor scores it, and all ranks end with it."""
    code, output = run(config, "old:engine 1", f"old-{layout}", "engine.count=2", *LAYOUTS[layout])
    assert code == 1, output
    last = output.splitlines()[-1]
    says = "dapo-megatron: error: engine 1 does not use the weights that it was sent, after the push of version 1. "
    assert last.startswith(says), output
    assert last.endswith("others are right: look at the log of this one: saved after 1 steps"), output
    assert "Traceback" not in output
    log: Any = (config.parent / f"old-{layout}/log.txt").read_text()
    assert "push of version 0" not in log, "both had the first version"


def test_two_engines_with_what_was_sent_pass(config: Path) -> None:
    code, output = run(config, "none", "right", "engine.count=2", *LAYOUTS["cp2"])
    assert code == 0, output
    rows = metrics(config.parent / "right")
    assert len(rows) == 3
    for row in rows:
        assert 0 < row["verify/canary"] <= row["verify/canary_max"] <= 2e-5
        assert row["mismatch/abs_max"] <= 2e-5
