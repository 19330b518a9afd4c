"""A run that is killed, whenever, and goes on gives what it would have given, bit for bit: whole runs, on real parts.

`make kill-test` kills at every place, and takes each piece of state out of a checkpoint to see that this is noticed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from examples.quickstart import sums
from examples.quickstart.base import untrained
from tests.helpers.killed_rank import PLACES, find
from tests.helpers.lives import differences, live, steps_of, write_config

pytestmark = [pytest.mark.vllm, pytest.mark.multiproc, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 5


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that has learned nothing, and sums to train and to be measured on."""
    folder = tmp_path_factory.mktemp("material")
    untrained(seed=0).save_pretrained(folder / "base")
    sums.tokenizer().save_pretrained(folder / "base")
    held_out, train = sums.split(seed=0, held_out=8, train=64)
    sums.write(folder / "heldout.jsonl", held_out)
    sums.write(folder / "train.jsonl", train)
    return folder


def values(material: Path, folder: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(material / "base"), "dtype": "float32"},
        "data": {"train": str(material / "train.jsonl"), "max_prompt_tokens": 16},
        "rollout": {"prompts": 4, "responses": 8, "max_response_tokens": 32, "dynamic_sampling": False},
        "reward": {"overlong": {"cache": 32}, "workers": 1},
        "train": {"steps": STEPS, "mini_batch": 16, "micro_batch_tokens": 512},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0, "weight_decay": 0.0},
        "eval": {"data": str(material / "heldout.jsonl"), "every": 2},
        "checkpoint": {"every": 2},
        "run": {"dir": str(folder), "name": "run"},
    }


@pytest.fixture(scope="module")
def undisturbed(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert live(write_config(folder, values(material, folder))) == 0
    return folder / "run"


@pytest.mark.parametrize("place", PLACES)
def test_there_is_such_a_place(place: str) -> None:
    owner, name = find(place)
    assert callable(getattr(owner, name))


@pytest.mark.parametrize(
    ("lives", "steps", "overrides"),
    [
        # One life from the start; the second, killed in step 3, goes on after step 2.
        pytest.param([("writing", 1), ("update", 6)], [0, 2], [], id="twice"),
        # Engines that sleep give the same responses, also to a run that goes on.
        pytest.param([("update", 7)], [2], ["engine.placement=colocated"], id="sleeping", marks=pytest.mark.long),
        # Two from the start; the third, killed in step 3, goes on after step 2.
        pytest.param(
            [("rollout", 3), ("writing", 1), ("update", 6), ("recording", 2)],
            [0, 0, 2, 2],
            [],
            id="four times",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_run_that_was_killed_is_the_run_that_was_not(
    tmp_path: Path,
    material: Path,
    undisturbed: Path,
    lives: list[tuple[str, int]],
    steps: list[int],
    overrides: list[str],
) -> None:
    config = write_config(tmp_path, values(material, tmp_path))
    for place, call in lives:
        assert live(config, *overrides, place=place, call=call) == -9
    assert live(config, *overrides) == 0
    assert steps_of(tmp_path / "run") == steps
    assert differences(tmp_path / "run", undisturbed) == []
