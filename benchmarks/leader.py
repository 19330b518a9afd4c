"""CPU time and memory that a rollout step takes on the leader, from the engines' answers to the ranks' micro-batches.

    python -m benchmarks.leader

A step of the paper's size: 512 prompts x 16 responses of 3,000 tokens on average (`benchmarks.canned` has their
distribution), for 16 data-parallel ranks. Everything is the run's own code: the client that reads the answers over
HTTP, dynamic sampling, grading by `reward.rule=dapo`, advantages, packing, and the way to the ranks over gloo. What is
made up: a server in a process of its own answers at once; there is no model, so the ranks, 15 other processes, make
their micro-batches, count the tokens and end.

What is counted is the leader's process alone: the CPU time of all its threads, which includes making the micro-batches
of its own rank, and the growth of its resident memory between the moment when everything is ready and the highest point
afterwards. Both are divided by the tokens of all sequences, prompts included. Other processes share the machine's
cores, so seconds by the clock are no measure of a step.

Exits with 1 where a target is missed; the memory's says little for a small step.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from multiprocessing import get_context
from os import environ
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
from transformers import Qwen2Config

from benchmarks import canned
from dapo_megatron.actor import topology
from dapo_megatron.actor.topology import Topology
from dapo_megatron.config import Config, ParallelConfig
from dapo_megatron.config_file import parse
from dapo_megatron.leader import Leader
from dapo_megatron.obs.observer import NullObserver
from dapo_megatron.preflight import Checked
from dapo_megatron.rollout.ports import reserve_port
from dapo_megatron.stop import Stop
from dapo_megatron.train import make_batch, receive
from dapo_megatron.types import MiniBatch, Prompt

RESPONSES, GROUP, RANKS = 8_192, 16, 16
PROMPT = (100, 300)
"""Tokens of the shortest and the longest prompt."""
MAX_MICROSECONDS, MAX_BYTES = 0.5, 24.0


def rank(number: int, port: int) -> None:
    """Be one of the ranks that are not the leader."""
    topo = join(number, port)
    count(topo, receive(topo, None, ParallelConfig()))
    topology.shutdown()


def join(number: int, port: int) -> Topology:
    environ.update(RANK=str(number), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    return topology.initialize(ParallelConfig())


def count(topo: Topology, mini_batches: list[MiniBatch]) -> int:
    """Count the tokens that are trained on, over all ranks."""
    own = sum(batch.loss_tokens for mini_batch in mini_batches for batch in mini_batch.micro_batches)
    return int(topo.sum(torch.tensor(own)))


@contextmanager
def ranks() -> Iterator[Topology]:
    """Start the other ranks and join them. They are forked from a process that has done the imports."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["dapo_megatron.train", "megatron.core.parallel_state"])
    with reserve_port("127.0.0.1", 0) as reserved:
        port = reserved.getsockname()[1]
    others = [context.Process(target=rank, args=(number, port), daemon=True) for number in range(1, RANKS)]
    for process in others:
        process.start()
    try:
        yield join(0, port)
        topology.shutdown()
        for process in others:
            process.join()
    finally:
        for process in others:
            process.kill()


def configuration(responses: int, folder: Path) -> Config:
    return parse(
        {
            "model": {"path": "not-there"},
            "data": {"train": "not-there.jsonl", "max_prompt_tokens": PROMPT[1]},
            "rollout": {"prompts": responses // GROUP, "responses": GROUP, "max_response_tokens": canned.CAP},
            "engine": {"kind": "benchmarks.canned:Adapter"},
            "train": {"mini_batch": 512, "micro_batch_tokens": 32_768},
            "run": {"dir": str(folder)},
        }
    )


def checked(prompts: int) -> Checked:
    """Return what `preflight` would read: the sizes of Qwen2.5-32B, and prompts."""
    rng = random.Random(0)
    return Checked(
        hf_config=Qwen2Config(
            vocab_size=152_064,
            hidden_size=5_120,
            intermediate_size=27_648,
            num_hidden_layers=64,
            num_attention_heads=40,
            num_key_value_heads=8,
        ),
        tokenizer=canned.tokenizer(),
        stop_token_ids=(0,),
        train=[
            Prompt(f"prompt {number}", tuple(rng.choices(range(10, 10_000), k=rng.randint(*PROMPT))), "", canned.RIGHT)
            for number in range(prompts)
        ],
        held_out={},
        warnings=(),
    )


def graders() -> float:
    """Return the CPU seconds so far of the processes that grade."""
    children = psutil.Process().children(recursive=True)
    times = [child.cpu_times() for child in children if "dapo_megatron.reward.worker" in child.cmdline()]
    return sum(time.user + time.system for time in times)


def reset_peak() -> int:
    """Return the resident bytes, and make them the highest so far."""
    Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak() -> int:
    """Return the most bytes that were resident since `reset_peak`."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "Linux tells the peak of a process in /proc/self/status"
    return int(found[1]) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=RESPONSES, help=f"a multiple of 512; {RESPONSES:,} by default")
    responses = parser.parse_args().responses
    with TemporaryDirectory() as folder, ranks() as topo:
        config = configuration(responses, Path(folder))
        with closing(Leader(config, NullObserver(), checked(config.rollout.prompts))) as leader:
            leader.engines.wait_ready()
            missed = measure(leader, topo)
    sys.exit(1 if missed else 0)


def measure(leader: Leader, topo: Topology) -> bool:
    """Print the figures of one step; return whether a target is missed."""
    wall, cpu, grading, base = time.perf_counter(), time.process_time(), graders(), reset_peak()
    batch = make_batch(leader, topo.dp, 0, Stop())
    assert batch, "nobody asks this to stop"
    middle, top = time.process_time(), peak()
    mini_batches = receive(topo, batch, leader.config.parallel)
    last = time.process_time()
    grading = graders() - grading
    top_end, wall = peak(), time.perf_counter() - wall

    completions = [completion for group in batch.rollout.groups for completion in group.completions]
    trained = sum(completion.length for completion in completions)
    tokens = trained + sum(len(g.prompt.token_ids) * len(g.completions) for g in batch.rollout.groups)
    arrived = count(topo, mini_batches)
    if arrived != trained:
        raise SystemExit(f"{trained:,} tokens were sampled, {arrived:,} came to the ranks")

    microseconds, size = 1e6 * (last - cpu) / tokens, (top_end - base) / tokens
    print(f"{len(completions):,} responses, {tokens:,} tokens with their prompts, {topo.dp} ranks; {wall:.1f} s")
    print(f"  {'':34} {'leader':>8} {'target':>8}")
    print(f"  {'CPU time, us per token':34} {microseconds:8.3f} {MAX_MICROSECONDS:8.3f}")
    print(f"  {'  sampling to packing':34} {1e6 * (middle - cpu) / tokens:8.3f}")
    print(f"  {'  to the ranks':34} {1e6 * (last - middle) / tokens:8.3f}")
    print(f"  {'peak memory, bytes per token':34} {size:8.1f} {MAX_BYTES:8.1f}")
    print(f"  {'  before the way to the ranks':34} {(top - base) / tokens:8.1f}")
    print(f"  {'CPU time of graders, us per token':34} {1e6 * grading / tokens:8.3f}")
    print(f"  {base / 2**20:,.0f} MiB were resident at the start, {top_end / 2**20:,.0f} at the peak")
    return microseconds > MAX_MICROSECONDS or size > MAX_BYTES


if __name__ == "__main__":
    main()
