"""Engines that die or hang in a rollout or a push: the run goes on and gives what it would have given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.quickstart import sums
from examples.quickstart.base import untrained
from tests.helpers.lives import ROOT, differences, live, metrics, write_config

pytestmark = [pytest.mark.vllm, pytest.mark.multiproc, pytest.mark.slow, pytest.mark.timeout(900)]

PROMPTS = 4
IN_THE_SECOND_STEP = f"prompt:{PROMPTS + 2}"
IN_THE_SECOND_PUSH = "push:1"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    untrained(seed=0).save_pretrained(folder / "base")
    sums.tokenizer().save_pretrained(folder / "base")
    sums.write(folder / "train.jsonl", sums.split(seed=0, held_out=8, train=64)[1])
    return folder


def values(material: Path, folder: Path, **engine: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(material / "base"), "dtype": "float32"},
        "data": {"train": str(material / "train.jsonl"), "max_prompt_tokens": 16},
        "rollout": {"prompts": PROMPTS, "responses": 8, "max_response_tokens": 32, "dynamic_sampling": False},
        "reward": {"overlong": {"cache": 32}, "workers": 1},
        "train": {"steps": 3, "mini_batch": 16, "micro_batch_tokens": 512},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0, "weight_decay": 0.0},
        "engine": {"stall_seconds": 6.0, **engine},
        "run": {"dir": str(folder), "name": "run"},
    }


@pytest.fixture(scope="module")
def undisturbed(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert live(write_config(folder, values(material, folder))) == 0
    return folder / "run"


def hurt(config: Path, number: str, *engines: int, place: str = IN_THE_SECOND_STEP) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    module = ["-m", "tests.helpers.hurt_engine", number, place, *map(str, engines)]
    command = [*launch, *module, "--", str(config)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("count", "number"),
    [
        pytest.param(1, "SIGKILL", id="the only one", marks=pytest.mark.long),
        pytest.param(2, "SIGKILL", id="one of two", marks=pytest.mark.long),
        pytest.param(1, "SIGSTOP", id="stopped", marks=pytest.mark.long),
    ],
)
def test_the_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, material: Path, undisturbed: Path, count: int, number: str
) -> None:
    done = hurt(write_config(tmp_path, values(material, tmp_path, count=count)), number, 0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "engine 0 is started again" in done.stdout + done.stderr
    assert differences(tmp_path / "run", undisturbed) == []


@pytest.mark.long
@pytest.mark.parametrize("transport", ["gloo", "disk"])
@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"])
def test_in_a_push_too_and_the_other_engine_is_pushed_to_again(
    tmp_path: Path, material: Path, undisturbed: Path, transport: str, number: str
) -> None:
    config = values(material, tmp_path, count=2) | {"weights": {"transport": transport}}
    done = hurt(write_config(tmp_path, config), number, 1, place=IN_THE_SECOND_PUSH)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "a push broke off; engine 0 can be pushed to again" in output
    assert output.count("engine 1 is started again") == 1 and "engine 0 is started again" not in output
    assert differences(tmp_path / "run", undisturbed) == []


@pytest.mark.long
def test_an_engine_that_is_given_up_ends_the_run_with_everything_saved(tmp_path: Path, material: Path) -> None:
    done = hurt(write_config(tmp_path, values(material, tmp_path, max_restarts=0)), "SIGKILL", 0)
    assert done.returncode == 1
    assert "engine 0 is given up: engine.max_restarts is 0: saved after 1 steps" in done.stderr
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1]
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-1\n"
