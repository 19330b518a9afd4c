"""`make kill-test`: kills at every place and at random moments, and checkpoints that lack one piece of state each."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dapo_megatron.checkpoint import folder as folders
from examples.quickstart.__main__ import make_base
from tests.helpers.killed_rank import PLACES, kill_tree
from tests.helpers.lives import ROOT, command, differences, live, steps_of, write_config

pytestmark = [pytest.mark.long, pytest.mark.vllm, pytest.mark.multiproc, pytest.mark.timeout(3600)]

STEPS = 6
KINDS: dict[str, dict[str, Any]] = {
    "one engine": {},
    "carry, two engines": {"rollout": {"surplus_groups": "carry", "generation_batch": 12}, "engine": {"count": 2}},
}
KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def base() -> Path:
    """The quick-start's model, which is right now and then: there are groups to keep and groups to drop."""
    folder = Path(".cache/quickstart/seed0")
    make_base(folder, 0)
    return ROOT / folder


def make_config(base: Path, folder: Path, kind: str) -> Path:
    values: dict[str, Any] = {
        "model": {"path": str(base / "base"), "dtype": "float32"},
        "data": {"train": str(base / "train.jsonl"), "max_prompt_tokens": 16},
        "rollout": {"prompts": 8, "responses": 8, "max_response_tokens": 64},
        "reward": {"overlong": {"cache": 16}},
        "algo": {"loss": "tests.helpers.drawing:drawing"},
        "train": {"steps": STEPS, "mini_batch": 32, "micro_batch_tokens": 2048},
        "optimizer": {"lr": 1e-4, "warmup_steps": 4},
        "eval": {"data": str(base / "heldout.jsonl"), "every": 2},
        "checkpoint": {"every": 2, "keep_last": 3},
        "run": {"dir": str(folder), "name": "run"},
    }
    for section, settings in KINDS[kind].items():
        values[section] = {**values.get(section, {}), **settings}
    return write_config(folder, values)


_UNDISTURBED: dict[str, tuple[Path, float]] = {}
"""Kind of run -> its folder, and the seconds that it took."""


@pytest.fixture
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory, kind: str) -> Path:
    if kind not in _UNDISTURBED:
        folder = tmp_path_factory.mktemp("undisturbed")
        started = time.monotonic()
        assert live(make_config(base, folder, kind)) == 0
        _UNDISTURBED[kind] = (folder / "run", time.monotonic() - started)
    return _UNDISTURBED[kind][0]


@KIND
def test_killed_at_every_place(tmp_path: Path, base: Path, undisturbed: Path, kind: str) -> None:
    config = make_config(base, tmp_path, kind)
    call = {"rollout": 20, "grading": 20, "update": 3, "logprobs": 2, "publishing": 2, "recording": 2}
    for place in PLACES:
        code = live(config, place=place, call=call.get(place, 1))
        assert code == -9, f"{place} was not come to; lives went on after steps {steps_of(tmp_path / 'run')}"
    assert live(config) == 0
    assert steps_of(tmp_path / "run")[-1] == 4
    assert differences(tmp_path / "run", undisturbed) == []


@KIND
def test_killed_at_twelve_random_moments(tmp_path: Path, base: Path, undisturbed: Path, kind: str) -> None:
    seed, seconds = random.randrange(1 << 30), _UNDISTURBED[kind][1]
    print(f"seed {seed}, {seconds:.0f} s undisturbed")
    moments, kills = random.Random(seed), 0
    while kills < 12:
        run = Path(tempfile.mkdtemp(dir=tmp_path))
        config = make_config(base, run, kind)
        # One that is over before its next moment has come is compared, and another one begun.
        while (code := live_until(config, moments.uniform(2, seconds))) is None:
            kills += 1
        assert code == 0
        print(f"{kills} kills so far; went on after steps {steps_of(run / 'run')}")
        assert differences(run / "run", undisturbed) == []


def live_until(config: Path, seconds: float) -> int | None:
    """Let a run live until it is over, and return its exit code, or kill it when its time is up."""
    process = subprocess.Popen(command(config), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        process.wait()
        time.sleep(0.5)
        return None


def without(owner: str, part: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        found = state[owner][part]
        assert found != value, "there is nothing to take away"
        state[owner][part] = value if isinstance(value, dict) else value(found)
        (folder / "state.json").write_text(json.dumps(state))

    return change


def record_of_another(folder: Path) -> None:
    """The place that the record had come to two steps before."""
    state, other = (json.loads((f / "state.json").read_text()) for f in (folder, folder.with_name("step-2")))
    assert state["leader"]["record"]["files"] != other["leader"]["record"]["files"]
    state["leader"]["record"]["files"] = other["leader"]["record"]["files"]
    (folder / "state.json").write_text(json.dumps(state))


def other_random_states(folder: Path) -> None:
    states, other = load_file(folder / "random.safetensors"), torch.Generator().manual_seed(7).get_state()
    changed = {name: other.clone() if name.endswith(".torch") else state for name, state in states.items()}
    save_file(changed, folder / "random.safetensors")


def optimizer_of_another(folder: Path) -> None:
    """Weights of this step, moments of another: what a save that forgot the optimizer comes to."""
    other = folder.with_name("step-2")
    for name in (".metadata", "common.pt", *(path.name for path in folder.glob("*.distcp"))):
        shutil.copyfile(other / name, folder / name)


PIECES: dict[str, Callable[[Path], None]] = {
    "prompts": without("leader", "prompts", lambda state: {**state, "position": 0}),
    "carried groups": without("leader", "carried", {"value": []}),
    "evaluations": without("leader", "evaluations", {"value": {}}),
    "steps done": without("shared", "steps_done", {"value": 3}),
    "record": record_of_another,
    "random states": other_random_states,
    "weights and optimizer": optimizer_of_another,
}


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("kind", ["carry, two engines"])
def test_a_piece_that_is_missing_is_noticed(
    tmp_path: Path, base: Path, undisturbed: Path, kind: str, piece: str
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    for name in ("summary.json", "hf"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    root = tmp_path / "run/checkpoints"
    (root / "latest").write_text("step-4\n")
    folder = root / "step-4"
    PIECES[piece](folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: asdict(folders.describe(folder / name)) for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert live(make_config(base, tmp_path, kind), f"run.dir={tmp_path}") == 0
    found = differences(tmp_path / "run", undisturbed)
    print(piece, found)
    assert found
