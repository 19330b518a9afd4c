"""`make quickstart`: make a base model and its problem, then teach it by DAPO. `--help` shows what can be changed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from dapo_megatron import config_file
from examples.quickstart.recipe import RECIPE

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart", description=__doc__)
    parser.add_argument("--config", default="configs/quickstart_cpu.yaml", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the base model and of the run; default: 0")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    arguments = parser.parse_args()

    folder = Path(f".cache/quickstart/seed{arguments.seed}")
    base_seconds = make_base(folder, arguments.seed)
    overrides = [
        f"train.seed={arguments.seed}",
        f"model.path={folder / 'base'}",
        f"data.train={folder / 'train.jsonl'}",
        f"eval.data={folder / 'heldout.jsonl'}",
        *arguments.overrides,
    ]
    command = [sys.executable, "-m", "dapo_megatron", "train", arguments.config, *overrides]
    if code := subprocess.call(command, cwd=ROOT):
        return code
    run = config_file.load(ROOT / arguments.config, overrides).run
    add_base_seconds(ROOT / run.folder / "summary.json", base_seconds)
    return 0


def make_base(folder: Path, seed: int) -> float:
    """Train the base model unless the cached one was made from the same recipe. Returns the seconds that took."""
    record = ROOT / folder / "base.json"
    if record.exists():
        made_from = json.loads(record.read_text())
        seconds = made_from.pop("seconds")
        if made_from == {**RECIPE, "seed": seed}:
            print(f"Base model: {folder / 'base'}, made earlier in {seconds:.0f} s")
            return seconds
    ranks = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launch, "-m", "examples.quickstart.base", str(folder), str(seed)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return json.loads(record.read_text())["seconds"]


def add_base_seconds(summary: Path, base_seconds: float) -> None:
    values = json.loads(summary.read_text())
    values["base_training_seconds"] = base_seconds
    values["seconds"] = round(values["seconds"] + base_seconds, 1)
    summary.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
