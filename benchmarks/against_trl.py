"""Seconds per rollout step beside TRL's GRPOTrainer with its DAPO loss: same base, prompts, group size and updates.

    make quickstart                                   # makes the base model and the data
    python3 -m venv .venv-trl && .venv-trl/bin/pip install -r benchmarks/requirements-trl.txt
    .venv/bin/python -m benchmarks.against_trl

The two systems take turns on the same machine. Compared is the wall-clock time of a whole rollout step (sampling,
grading, log-probs, updates, weight push) at the same step number; the first steps, which warm up, are left out.
TRL has no dynamic sampling, so it is off here for both; the last line shows what it costs us.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
WARM_UP = 2


def ours(folder: Path, steps: int, seed: int, *, dynamic_sampling: bool) -> dict[str, list[float]]:
    overrides = [
        f"model.path={folder / 'base'}",
        f"data.train={folder / 'train.jsonl'}",
        "eval.data=null",
        f"train.steps={steps}",
        f"train.seed={seed}",
        f"rollout.dynamic_sampling={str(dynamic_sampling).lower()}",
        "run.name=against_trl",
        "run.save_hf=false",
    ]
    command = [sys.executable, "-m", "dapo_megatron", "train", "configs/quickstart_cpu.yaml", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = (ROOT / "runs/against_trl/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "seconds/step" in row]
    return {
        "seconds": [row["seconds/step"] for row in rows],
        "length": [row["response_length"] for row in rows],
        "accuracy": [row["accuracy"] for row in rows],
    }


def trl(folder: Path, steps: int, seed: int) -> dict[str, list[float]]:
    command = [".venv-trl/bin/python", "benchmarks/trl_run.py", str(folder), str(steps), str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(".cache/quickstart/seed0"))
    arguments = parser.parse_args()

    seconds: dict[str, list[list[float]]] = {"dapo_megatron": [], "TRL": []}
    for seed in range(arguments.rounds):
        for name in seconds:
            if name == "TRL":
                result = trl(arguments.folder, arguments.steps, seed)
            else:
                result = ours(arguments.folder, arguments.steps, seed, dynamic_sampling=False)
            seconds[name].append(result["seconds"])
            print(
                f"round {seed + 1} {name:>14}: median {median(result['seconds'][WARM_UP:]):.2f} s a step, "
                f"response length {result['length'][0]:.1f} -> {result['length'][-1]:.1f}",
                flush=True,
            )
    ratios = [
        theirs / ours_
        for run, other in zip(seconds["dapo_megatron"], seconds["TRL"], strict=True)
        for ours_, theirs in zip(run[WARM_UP:], other[WARM_UP:], strict=True)
    ]
    for name, runs in seconds.items():
        print(f"{name:>14}: {median(s for run in runs for s in run[WARM_UP:]):.2f} s a step (median)")
    print(f"TRL / dapo_megatron at matched steps, median: {median(ratios):.2f}")
    sampled = ours(arguments.folder, arguments.steps, 0, dynamic_sampling=True)
    print(f"dapo_megatron with dynamic sampling: {median(sampled['seconds'][WARM_UP:]):.2f} s a step (median)")


if __name__ == "__main__":
    main()
