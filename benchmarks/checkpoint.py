"""What a checkpoint adds to a step, written while the next one runs and written at once; and how long reading takes.

    python -m benchmarks.checkpoint [--sizes 15M,150M]

Two data-parallel ranks, one thread each. A step is what ranks do in one without the engines: log-probs of four
mini-batches and four updates; with its rollout it takes longer, and a checkpoint adds less. The kinds of step take
turns, and the median counts. A checkpoint that is written meanwhile counts with all it costs: the wait until it is
copied, and what its writer takes from the step. What is left of it then is waited for between steps, out of the clock,
and printed.

Exits with 1 where a checkpoint that is written meanwhile adds more than 15%.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.train_step import SIZES, Size, rollout, save_model
from dapo_megatron.actor import topology
from dapo_megatron.actor.actor import Actor
from dapo_megatron.algo.objective import Objective
from dapo_megatron.checkpoint.checkpoints import Checkpoints
from dapo_megatron.config import Config
from dapo_megatron.config_file import parse
from dapo_megatron.pack import Share, pack
from dapo_megatron.state import RunState
from dapo_megatron.weights.hf import HfCheckpoint

MOST_ADDED = 0.15
ALL = {**SIZES, "150M": Size(768, 3_072, 14, 12, 4, 16_384, sequences=8)}
ROUNDS = {"15M": 5, "150M": 3}
UPDATES = 4


def measure(name: str, folder: Path) -> float:
    """Print what checkpoints of this size cost. Returns the share of a step that one written meanwhile adds."""
    torch.set_num_threads(1)
    config, sequences = parse_config(folder, asynchronous=True), ALL[name].sequences
    topo = topology.initialize(config.parallel)
    hf = HfCheckpoint(folder / "model")
    actor, objective = Actor(config, topo, hf), Objective(config.algo)
    state = RunState({} if topo.is_leader else None)
    settings = {"meanwhile": config, "at once": parse_config(folder, asynchronous=False)}
    checkpoints = {kind: Checkpoints(config, topo, actor, hf, state) for kind, config in settings.items()}
    samples = rollout(replace(ALL[name], sequences=sequences * UPDATES), seed=0)
    packed = pack(samples, mini_batch=sequences, micro_batch_tokens=4_096, replicas=topo.dp, seed="0")
    mini_batches = Share(*packed.share(topo.dp_rank)).mini_batches()

    def step() -> None:
        filled, _ = actor.with_old_logprobs(mini_batches)
        for mini_batch in filled:
            actor.update(mini_batch, objective, lr=1e-6)

    def timed(kind: str, number: int) -> tuple[float, float, float]:
        """Seconds of a step with what it saves, of the copying or writing before it, and of the writing after it."""
        topo.sum(torch.zeros(1))
        started = time.perf_counter()
        if kind != "alone":
            checkpoints[kind].save(number)
        saved = time.perf_counter()
        step()
        topo.sum(torch.zeros(1))
        ended = time.perf_counter()
        if kind != "alone":
            checkpoints[kind].finish()
        return ended - started, saved - started, time.perf_counter() - ended

    step()
    kinds = ("alone", "meanwhile", "at once")
    rounds = [
        {kind: timed(kind, 10 * number + place) for place, kind in enumerate(kinds)}
        for number in range(1, 2 + ROUNDS[name])
    ]
    seconds = {kind: median(row[kind][0] for row in rounds[1:]) for kind in kinds}
    before = {kind: median(row[kind][1] for row in rounds[1:]) for kind in kinds}
    after = {kind: median(row[kind][2] for row in rounds[1:]) for kind in kinds}
    started = time.perf_counter()
    checkpoints["at once"].restore()
    reading = time.perf_counter() - started
    if topo.is_leader:
        latest = max((folder / "run/checkpoints").glob("step-*"), key=lambda path: path.stat().st_mtime)
        gigabytes = sum(path.stat().st_size for path in latest.rglob("*") if path.is_file()) / 1e9
        alone = seconds["alone"]
        print(f"{name}: a checkpoint has {gigabytes:.2f} GB, a step takes {alone:.2f} s on {topo.dp} ranks")
        for kind in kinds[1:]:
            added = seconds[kind] - alone
            waits = f"{before[kind]:.2f} s pass before it, {after[kind]:.2f} s after it"
            print(f"  written {kind:<9} adds {added / alone:6.1%} ({added:.2f} s); {waits}")
        print(f"  reading it takes {reading / alone:.0%} of a step ({reading:.2f} s)")
    topology.shutdown()
    return (seconds["meanwhile"] - seconds["alone"]) / seconds["alone"]


def parse_config(folder: Path, *, asynchronous: bool) -> Config:
    return parse(
        {
            "model": {"path": str(folder / "model"), "dtype": "bfloat16"},
            "data": {"train": "not-there.jsonl", "max_prompt_tokens": 64},
            "rollout": {"max_response_tokens": 1_024},
            "reward": {"overlong": {"punishment": False}},
            "train": {"micro_batch_tokens": 4_096},
            "checkpoint": {"asynchronous": asynchronous, "keep_last": 1},
            "run": {"dir": str(folder), "name": "run"},
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="15M,150M", help="default: %(default)s")
    parser.add_argument("--measure", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return 1 if measure(arguments.sizes, arguments.measure) > MOST_ADDED else 0
    missed = False
    for name in arguments.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder) / "model", ALL[name])
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            rank = ["-m", "benchmarks.checkpoint", f"--sizes={name}", f"--measure={folder}"]
            missed |= subprocess.run([*launch, *rank], check=False, stderr=subprocess.DEVNULL).returncode != 0
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
