"""MFU, tokens per second and memory of the training step of one GPU.

    python -m benchmarks.gpu_step [--shape 7b] [--layers torch]

A stack of Qwen2.5-7B's shape, with as many layers as fit, makes updates on packed sequences of 2k to 16k tokens: the
log-prob pass, then forward, backward, clipping and AdamW in bfloat16 with float32 main weights. MFU is model operations
(`gpu_shapes.model_flops`) per second over those of an 8192 x 8192 x 8192 product, measured in the same run.

The layers that fit, and the peak that the measured one is compared with, come from the same actor under fake tensors
(`tests.helpers.fake_mesh`), which has torch's layers and knows no workspaces of kernels and no fragmentation.

Exits with 1 where a target is missed. On a machine without a GPU, `--shape tiny` shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_shapes import (
    SHAPES,
    RandomWeights,
    card,
    gemm_flops_per_second,
    micro_batch,
    model_flops,
    ragged,
    seconds,
    verdict,
)
from dapo_megatron.config import Config, ParallelConfig
from dapo_megatron.measures import values

ROOT = Path(__file__).parents[1]
GIB = 2**30
MIN_MFU = 0.45
MAX_OFF = 0.10
"""Of the measured peak from the fake run's."""
RESERVE = 0.08
"""Share of the free memory that is left for what the fake run does not see."""
SHORTEST, PROMPT = 2_048, 128


def make_config(layers: str | None, recompute: str, tokens: int) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "unused", "dtype": "bfloat16", "layers": layers},
            "memory": {"recompute": recompute},
            "data": {"train": "unused", "max_prompt_tokens": PROMPT},
            "rollout": {"prompts": 4, "responses": 2, "max_response_tokens": tokens},
            "reward": {"overlong": {"punishment": False}},
            "train": {"mini_batch": 8},
        }
    )


def fake_costs(shape: str, layers: list[int], lengths: list[int], recompute: str) -> list[dict[str, int]]:
    """Ask a process that sees no GPU what stacks of these many layers take, in bytes."""
    job = json.dumps({"shape": shape, "layers": layers, "lengths": lengths, "recompute": recompute})
    command = [sys.executable, "-m", "benchmarks.gpu_step", "--fake", job]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_fake_costs(job: dict[str, Any]) -> None:
    from dapo_megatron.actor import logprobs
    from tests.helpers.fake_mesh import fake_rank_cost

    # Large chunks, as on a GPU: there are fewer of them to be played through.
    logprobs._CHUNK_ELEMENTS["cpu"] = logprobs._CHUNK_ELEMENTS["cuda"]
    config = make_config("torch", job["recompute"], max(job["lengths"]))
    costs = []
    for layers in job["layers"]:
        shape = {**SHAPES[job["shape"]], "num_hidden_layers": layers}
        cost = fake_rank_cost(shape, config, world_size=1, rank=0, lengths=job["lengths"])
        state = cost.parameter_bytes + cost.gradient_bytes + cost.optimizer_bytes
        costs.append({"state": state, "peak": cost.peak_bytes})
    print(json.dumps(costs))


def layers_that_fit(shape: str, lengths: list[int], recompute: str) -> int:
    """Return how many layers of this shape leave RESERVE of the free memory."""
    most = SHAPES[shape]["num_hidden_layers"]
    if not torch.cuda.is_available():
        return most
    free, _ = torch.cuda.mem_get_info()
    one, two = (cost["peak"] for cost in fake_costs(shape, [1, 2], lengths, recompute))
    return max(1, min(most, int(((1 - RESERVE) * free - one) // (two - one)) + 1))


def measure(arguments: argparse.Namespace) -> bool:
    from dapo_megatron.actor import topology
    from dapo_megatron.actor.actor import Actor
    from dapo_megatron.actor.architecture import uses_transformer_engine
    from dapo_megatron.algo.objective import Objective
    from dapo_megatron.obs.memory import PeakMemory
    from dapo_megatron.types import MiniBatch

    topo = topology.initialize(ParallelConfig())
    gemm = gemm_flops_per_second()
    print(f"{card()}: a product in bfloat16 makes {gemm / 1e12:,.1f} TFLOP/s")
    lengths = ragged(arguments.tokens, min(SHORTEST, arguments.tokens), arguments.tokens // 2)
    depth = arguments.depth or layers_that_fit(arguments.shape, lengths, arguments.recompute)
    config = make_config(arguments.layers, arguments.recompute, arguments.tokens)
    weights = RandomWeights(SHAPES[arguments.shape], depth)
    actor, objective, memory = Actor(config, topo, weights), Objective(config.algo), PeakMemory()
    vocabulary = weights.hf_config.vocab_size
    batches = [micro_batch(lengths, vocabulary, prompt=PROMPT, seed=seed) for seed in range(arguments.micro_batches)]
    mini_batch = MiniBatch(tuple(batches), sum(batch.loss_tokens for batch in batches))
    kind = "Transformer Engine's" if uses_transformer_engine(config.model) else "torch's"
    print(
        f"shape {arguments.shape}, {depth} of {SHAPES[arguments.shape]['num_hidden_layers']} layers, {kind}; "
        f"{len(batches)} micro-batches of {batches[0].slots:,} slots, sequences {', '.join(map(str, lengths))}; "
        f"recompute {arguments.recompute}"
    )

    def logprobs() -> None:
        nonlocal mini_batch
        with memory.phase("logprobs"):
            (mini_batch,), _ = actor.with_old_logprobs([mini_batch])

    def update() -> None:
        with memory.phase("update"):
            result = actor.update(mini_batch, objective, lr=1e-6)
        assert result.skipped is None, result.skipped

    taken: dict[str, list[float]] = {"logprobs": [], "update": []}
    for number in range(arguments.warm_up + arguments.rounds):
        if number == arguments.warm_up:
            memory.take()
        for name, work in (("logprobs", logprobs), ("update", update)):
            once = seconds(work)
            if number >= arguments.warm_up:
                taken[name].append(once)
    slots, flops = sum(batch.slots for batch in batches), model_flops(weights.hf_config, batches)
    for name, share in (("logprobs", 1 / 3), ("update", 1.0)):
        once = median(taken[name])
        rate = flops * share / once
        print(f"{name}: {once:.3f} s, {slots / once:,.0f} tokens/s, {rate / 1e12:,.1f} TFLOP/s, {rate / gemm:.1%} MFU")
    mfu = flops / median(taken["update"]) / gemm
    peaks = values(memory.take())
    print("peak GiB: " + ", ".join(f"{name.removeprefix('memory/')} {size:.2f}" for name, size in peaks.items()))
    (fake,) = fake_costs(arguments.shape, [depth], lengths, arguments.recompute)
    print(f"fake run, torch's layers, GiB: state {fake['state'] / GIB:.2f}, peak {fake['peak'] / GIB:.2f}")
    topology.shutdown()
    if not torch.cuda.is_available():
        print("(targets are for GPUs)")
        return True
    off = peaks["memory/update"] * GIB / fake["peak"] - 1
    met = verdict(f"MFU of the update {mfu:.1%}, at least {MIN_MFU:.0%}", mfu >= MIN_MFU)
    if uses_transformer_engine(config.model):
        print(f"measured peak {off:+.1%} from that of the fake run, whose layers keep more")
        return met
    return verdict(f"measured peak {off:+.1%} from the fake run's, within {MAX_OFF:.0%}", abs(off) <= MAX_OFF) and met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--depth", type=int, help="layers; as many as fit by default")
    parser.add_argument("--layers", choices=["transformer_engine", "torch"], help="as model.layers")
    parser.add_argument("--recompute", choices=["none", "full"], default="none")
    parser.add_argument("--tokens", type=int, default=32_768, help="slots of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fake", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.fake:
        print_fake_costs(arguments.fake)
        return
    sys.exit(0 if measure(arguments) else 1)


if __name__ == "__main__":
    main()
