"""A DAPO step on one GPU with an engine that sleeps while the actor trains: seconds, and memory by phase.

    python -m benchmarks.gpu_colocated

The run of `gpu_rollout` with engine.sleep: the actor leaves the card while the engine samples, the engine while the
actor trains. Turning takes time, `sleep`, `wake` and `offload`, which should be a fifth of a step at most (target).
While the engine samples, the rank should have nothing on the card that torch has allocated (target), and the engine
should give up at least half of its share each time that it sleeps, as vLLM says in its log (target).

On a machine without a GPU, `--shape tiny` shows that it runs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

import torch

from benchmarks.gpu_rollout import describe, material, middle, parse, train
from benchmarks.gpu_shapes import verdict
from dapo_megatron.rollout.place import OF_A_GPU_IN_TURNS

MAX_TURNING = 0.2
"""Of a step's time, for going to sleep, waking and moving."""
MAX_LEFT_GIB = 0.25
"""Of the rank's, while the engine samples."""
MIN_FREED = 0.5
"""Of the engine's share, each time that it sleeps."""


def report(rows: Sequence[dict[str, float]], engine_log: str) -> bool:
    describe(rows)
    turning = sum(middle(rows, f"seconds/{name}") for name in ("sleep", "wake", "offload"))
    share = turning / middle(rows, "seconds/step")
    freed = [float(gib) for gib in re.findall(r"Sleep mode freed ([\d.]+) GiB", engine_log)]
    print(
        f"turning: {turning:.2f} s a step; freed by the engine, GiB: {', '.join(map(str, freed)) or 'it does not say'}"
    )
    if not torch.cuda.is_available():
        print("(targets are for GPUs)")
        return True
    left = max(row["memory/rollout"] for row in rows)
    wanted = MIN_FREED * OF_A_GPU_IN_TURNS * torch.cuda.mem_get_info()[1] / 2**30
    met = verdict(f"{share:.0%} of a step is turning, at most {MAX_TURNING:.0%}", share <= MAX_TURNING)
    met &= verdict(f"{left:.2f} GiB of the rank's beside the rollout, at most {MAX_LEFT_GIB}", left <= MAX_LEFT_GIB)
    least = min(freed, default=0.0)
    return verdict(f"{least:.1f} GiB freed each time, at least {wanted:.1f}", least >= wanted) and met


def main() -> None:
    arguments = parse(__doc__)
    with material(arguments) as folder:
        rows = train(folder, arguments, sleep=True)
        log = (folder / "run/engine0.log").read_text()
    sys.exit(0 if report(rows, log) else 1)


if __name__ == "__main__":
    main()
