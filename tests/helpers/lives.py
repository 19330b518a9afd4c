"""Runs that are killed and go on, and what has to be the same as if they never were."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
_TIMES = re.compile(r"time|seconds/.*|eval/(.*/)?seconds|tokens_per_second|memory/.*|engine/.*|push/.*")
"""What differs between two runs of the same: seconds, memory, engines that failed and what they got."""


def command(config: Path, *overrides: str, ranks: int = 2, place: str = "nowhere", call: int = 1) -> list[str]:
    """The command line of one life of a run, to be started in ROOT."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    module = ["-m", "tests.helpers.killed_rank", place, str(call)]
    return [sys.executable, *launch, *module, str(config), "run.existing=resume", *overrides]


def live(config: Path, *overrides: str, ranks: int = 2, place: str = "nowhere", call: int = 1) -> int:
    """Let a run live until it is over or killed at a place (`killed_rank`). Returns torchrun's exit code."""
    done = subprocess.run(
        command(config, *overrides, ranks=ranks, place=place, call=call),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode in (0, -9), done.stdout + done.stderr
    return done.returncode


def write_config(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def metrics(run: Path) -> list[dict[str, Any]]:
    """Every row of metrics.jsonl, without what says how long something took or how much memory."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not _TIMES.fullmatch(name)} for row in rows]


def differences(run: Path, undisturbed: Path) -> list[str]:
    """Say in what a run differs from one that was never killed; nothing, bit for bit, where it does not."""
    found = []
    mine, theirs = metrics(run), metrics(undisturbed)
    if [row["step"] for row in mine] != [row["step"] for row in theirs]:
        found.append(f"rows of metrics: {[row['step'] for row in mine]} and {[row['step'] for row in theirs]}")
    for one, other in zip(mine, theirs, strict=False):
        names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        if names:
            found.append(f"step {one['step']}: {', '.join(names)}")
    if results(run) != results(undisturbed):
        found.append(f"summary: {results(run)} and {results(undisturbed)}")
    files = ("rollouts.jsonl", "hf/model.safetensors")
    return found + [name for name in files if (run / name).read_bytes() != (undisturbed / name).read_bytes()]


def results(run: Path) -> dict[str, Any]:
    """What summary.json says, but how long and in how many lives."""
    summary = json.loads((run / "summary.json").read_text())
    return {name: value for name, value in summary.items() if name != "lives" and not name.startswith("seconds")}


def steps_of(run: Path) -> Sequence[int]:
    """From which steps the lives of a run went on."""
    return [life["step"] for life in json.loads((run / "versions.json").read_text()).get("resumed", [])]
