"""Whole runs from the command line: real ranks, a real engine, live weight pushes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from dapo_megatron.config import AlgoConfig
from dapo_megatron.obs.metrics import METRICS
from examples.quickstart import sums
from examples.quickstart.base import untrained

pytestmark = [pytest.mark.vllm, pytest.mark.multiproc, pytest.mark.slow]

LIMIT_SECONDS = 150
LONG = pytest.mark.long
"""Seen without an engine in every `make test`, too: layouts by check-reduction, lost ranks by test_rank.py."""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("material"))


def write_material(folder: Path) -> Path:
    """A checkpoint that has learned nothing, and sums to train and to be measured on."""
    untrained(seed=0).save_pretrained(folder / "base")
    sums.tokenizer().save_pretrained(folder / "base")
    held_out, train = sums.split(seed=0, held_out=8, train=64)
    sums.write(folder / "heldout.jsonl", held_out)
    sums.write(folder / "train.jsonl", train)
    return folder


def command(material: Path, folder: Path, *overrides: str) -> list[str]:
    """A run whose reward is the length punishment alone: an untrained model has no right answers to learn from."""
    values = {
        "model": {"path": str(material / "base"), "dtype": "float32"},
        "launch": {"processes": 2},
        "data": {"train": str(material / "train.jsonl"), "max_prompt_tokens": 16},
        "rollout": {"prompts": 4, "responses": 8, "max_response_tokens": 32, "dynamic_sampling": False},
        "reward": {"overlong": {"cache": 32}, "workers": 1},
        "train": {"steps": 2, "mini_batch": 16, "micro_batch_tokens": 512},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0, "weight_decay": 0.0},
        "eval": {"data": str(material / "heldout.jsonl")},
        "run": {"dir": str(folder), "name": "run"},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    return [sys.executable, "-m", "dapo_megatron", "train", str(config), *overrides]


def run(
    material: Path, folder: Path, *overrides: str, limit_seconds: float = LIMIT_SECONDS
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(material, folder, *overrides), capture_output=True, text=True, timeout=limit_seconds, check=False
    )


OPTIONAL = {
    *("kl/ref", "correction/weight", "correction/truncated", "correction/masked"),
    *("memory/offload", "memory/reserved", "memory/device", "seconds/offload"),
    *("memory/sleep", "memory/wake", "seconds/sleep", "seconds/wake", "engine/sleep_seconds", "engine/wake_seconds"),
    *(f"{norm}/{kind}" for norm in ("grad_norm", "weight_norm", "update_ratio") for kind in ("output", "other")),
}
"""Metrics that depend on the configuration or the model."""


def assert_metrics_have_meanings(folder: Path, overrides: Sequence[str]) -> None:
    """Everything written is in the table, and everything in the table is written."""
    loss = "gspo" if "algo.loss=gspo" in overrides else "dapo"
    meanings = {*METRICS, *AlgoConfig(loss=loss).found_loss.meanings}
    written = {name for line in (folder / "run/metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert written - {"step", "time"} <= meanings
    assert meanings - written <= OPTIONAL
    assert ("kl/ref" in written) == any(override.startswith("algo.kl.coef") for override in overrides)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The steps in metrics.jsonl."""
    path = folder / "run/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="dp2", marks=LONG),
        pytest.param(
            [
                "parallel.tp=2",
                "parallel.sequence_parallel=true",
                "algo.kl.coef=0.05",
                "algo.loss_scope=sample",
                "algo.dapo.clip_high=0.2",
            ],
            id="tp2-grpo",
            marks=LONG,
        ),
        pytest.param(
            [
                "parallel.pp=2",
                "parallel.vpp=2",
                "parallel.overlap_grad_reduce=true",
                "algo.correction.kind=masked",
                "algo.correction.band=[0.9999999,1.0000001]",
                "engine.placement=colocated",
            ],
            id="pp2-vpp2-masked-sleeping",
        ),
        pytest.param(["parallel.cp=2", "algo.loss=gspo", "algo.loss_scope=sample"], id="cp2-gspo", marks=LONG),
    ],
)
def test_a_run_trains_and_the_engine_follows(material: Path, tmp_path: Path, overrides: Sequence[str]) -> None:
    done = run(material, tmp_path, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = rows(tmp_path)
    # The engine samples the second step with the weights that the first one made.
    for row in (first, second):
        assert row["mismatch/abs_max"] <= 2e-5
        assert row["grad_norm"] > 0
    assert first["ratio/first_max"] == 1.0, "old log-probs go through the kernels of the update"
    assert first["ratio/max"] > 1, "the second update of a step is off-policy"
    assert first["updates/skipped"] == 0
    if "algo.correction.kind=masked" in overrides:
        trained = first["loss_tokens"] / (1 - first["correction/masked"])
        assert 0 < first["correction/masked"] < 1 and trained == pytest.approx(round(trained), abs=1e-6)
    if "algo.kl.coef=0.05" in overrides:
        assert first["kl/ref"] > 0
    if "engine.placement=colocated" in overrides:
        turns = {"engine/sleep_seconds", "engine/wake_seconds", "seconds/sleep", "seconds/wake", "seconds/offload"}
        assert all(row[name] > 0 for row in (first, second) for name in turns)
        engine = (tmp_path / "run/engine0.log").read_text()
        # At the start and after both steps; the weights and the cache for both steps and the last evaluation.
        assert (engine.count("to fall asleep"), engine.count("to wake up tags")) == (3, 6)

    assert_metrics_have_meanings(tmp_path, overrides)
    before = load_file(material / "base/model.safetensors")
    after = load_file(tmp_path / "run/hf/model.safetensors")
    assert set(before) == set(after)
    assert all(not before[name].equal(after[name]) for name in before)

    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert set(summary) >= {"base_accuracy", "final_accuracy", "base_length", "final_length", "seconds", "seed"}
    for name in ("config.yaml", "versions.json", "rollouts.jsonl", "log.txt", "engine0.log"):
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_a_rank_and_an_engine_share_a_gpu(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", first)
    overrides = ["launch.processes=1", "model.dtype=bfloat16", "optimizer.lr=1e-2"]
    refused = run(material, tmp_path, *overrides)
    assert refused.returncode == 2 and "engine.placement=colocated" in refused.stderr, refused.stderr
    done = run(material, tmp_path, *overrides, "engine.placement=colocated", limit_seconds=800)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in rows(tmp_path):
        assert row["mismatch/abs"] <= 0.02, "the engine samples with other weights"
        assert row["grad_norm"] > 0
    assert len(rows(tmp_path)) == 2
    log = (tmp_path / "run/log.txt").read_text()
    phases = [
        name for name in re.findall(r"phase ([a-z ]+): ", log) if name in ("starting engines", "building the actor")
    ]
    assert phases == ["starting engines", "building the actor"]


def test_an_update_that_is_not_finite_is_kept_and_ends_the_run(material: Path, tmp_path: Path) -> None:
    done = run(material, tmp_path, "optimizer.lr=1e30", "train.max_skipped_updates=1")
    assert done.returncode == 1
    assert "step 0, update 1: " in done.stderr and "1 in a row, at which train.max_skipped_updates(1)" in done.stderr
    assert "Traceback" not in done.stderr
    (file,) = (tmp_path / "run/skipped").iterdir()
    with safe_open(file, framework="pt") as kept:
        masks = [kept.get_tensor(name) for name in kept.keys() if name.endswith("loss_mask_T")]  # noqa: SIM118
        metadata = kept.metadata()
    assert metadata["ranks"] == "2"
    assert sum(int(mask_T.sum()) for mask_T in masks) == int(metadata["loss_tokens"]) > 0


@LONG
def test_too_few_mixed_groups_end_the_run_with_the_counts(material: Path, tmp_path: Path) -> None:
    done = run(material, tmp_path, "rollout.dynamic_sampling=true", "rollout.max_generation_batches=2")
    assert done.returncode == 1
    assert "0 groups to train on, 4 wanted" in done.stderr
    assert "8 all wrong" in done.stderr and done.stderr.splitlines()[-1].endswith("no step was done")
    assert "Traceback" not in done.stderr


Family = list[psutil.Process]


@pytest.fixture
def running(material: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Family]]:
    """A run that has done its first step, with all of its processes; whatever is left of it is killed."""
    process = subprocess.Popen(
        command(material, tmp_path, "train.steps=10000", "launch.lost_seconds=5"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    family: Family = []
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not rows(tmp_path):
            assert process.poll() is None, process.stdout and process.stdout.read()
            assert time.monotonic() < deadline, "no step was done in time"
            time.sleep(0.1)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        yield process, family
    finally:
        for member in family:
            if member.is_running():
                member.kill()
        process.kill()


def engine(family: Family) -> Family:
    return [member for member in family if any("vllm.entrypoints" in part for part in member.cmdline())]


def ranks(family: Family) -> Family:
    """The leader first."""
    found = [member for member in family if member.environ().get("RANK") and "dapo_megatron.train" in member.cmdline()]
    return sorted(found, key=lambda member: member.environ()["RANK"])


@pytest.mark.parametrize(
    ("act", "code", "says"),
    [
        pytest.param(lambda family: family[0].send_signal(signal.SIGINT), 130, "interrupted", id="ctrl_c"),
        pytest.param(lambda family: family[0].terminate(), 75, "stopped by SIGTERM", id="sigterm", marks=LONG),
        pytest.param(
            lambda family: ranks(family)[1].kill(), 1, "rank 1 was ended by SIGKILL", id="dead_rank", marks=LONG
        ),
        pytest.param(
            lambda family: ranks(family)[0].kill(), 1, "rank 0 was ended by SIGKILL", id="dead_leader", marks=LONG
        ),
        pytest.param(lambda family: ranks(family)[1].suspend(), 1, "error: rank 1 on ", id="stopped_rank", marks=LONG),
        pytest.param(
            lambda family: ranks(family)[0].suspend(),
            1,
            "error: the leader, rank 0 on ",
            id="stopped_leader",
            marks=LONG,
        ),
        pytest.param(lambda family: family[0].kill(), -signal.SIGKILL, "", id="killed_launcher", marks=LONG),
    ],
)
def test_however_a_run_ends_nothing_is_left(
    running: tuple[subprocess.Popen[str], Family], act: Callable[[Family], None], code: int, says: str
) -> None:
    process, family = running
    assert engine(family) and len(ranks(family)) == 2
    act(family)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert says in output
    assert "Traceback" not in output
    _, left = psutil.wait_procs(family[1:], timeout=30)
    assert not left, [member.cmdline() for member in left]
