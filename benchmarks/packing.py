"""Waste, imbalance and seconds of packing one rollout step of the paper's size, beside a naive way.

    python -m benchmarks.packing

8,192 responses, a rollout step of the paper, for 16 data-parallel ranks: in its 16 mini-batches of 512, and in one.
Lengths of responses are lognormal with mean 3,000 and sigma 0.8 (median 2,180, one in a hundred above 14,000), cut at
20,480; prompts have 100 to 300 tokens. Naive is what needs no thought: responses go to the ranks in turn, and each
rank begins a new micro-batch where the next response does not fit. Both use the same shuffle. Seconds are the leader's:
to decide who goes where, and to lay out the shares of all ranks one after the other.

Imbalance is that of the worst update. Cost counts attention, which here equals all the rest at 12 x hidden size tokens
(`dapo_megatron.pack.cost` says why). Counting operations, it would be about 97,000 for Qwen2.5-32B with its wide MLP;
12 x 5,120 = 61,440 allows for attention that runs at about two thirds of the speed of plain matrix products, and is the
harder case for balance.

Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Sequence
from itertools import product
from statistics import median

import torch

from dapo_megatron.measures import values
from dapo_megatron.pack import Packed, pack, packing
from dapo_megatron.pack.bins import Bin
from dapo_megatron.pack.microbatch import slots
from dapo_megatron.types import TrainSample

RESPONSES, GROUP, RANKS, BUDGET = 8_192, 16, 16, 32_768
MEAN, SIGMA, CAP, PROMPT = 3_000, 0.8, 20_480, (100, 300)
LAYOUTS = {"plain": (1, 1), "cp 2, tp 8 with sp": (4, 8)}
"""sequence_multiple and total_multiple."""
ATTENTION_TOKENS = {"7B": 12 * 3_584, "32B": 12 * 5_120}
MAX_WASTE, MAX_IMBALANCE, MAX_SECONDS = 0.03, 0.05, 2.0


def rollout(seed: int) -> list[TrainSample]:
    rng = random.Random(seed)
    mu = math.log(MEAN) - SIGMA**2 / 2
    samples = []
    for number in range(RESPONSES):
        prompt, response = rng.randint(*PROMPT), min(CAP, max(1, round(rng.lognormvariate(mu, SIGMA))))
        loss_mask = torch.arange(prompt + response) >= prompt
        logprobs = torch.zeros(prompt + response)
        tokens = torch.randint(150_000, (prompt + response,), dtype=torch.int32)
        samples.append(TrainSample(tokens, loss_mask, logprobs, rng.gauss(0, 1), number // GROUP))
    return samples


def naive(
    samples: Sequence[TrainSample],
    *,
    mini_batch: int,
    micro_batch_tokens: int,
    replicas: int,
    seed: str,
    sequence_multiple: int,
    total_multiple: int,
    attention_tokens: float,
) -> Packed:
    """Ranks in turn, micro-batches in order; a rank with fewer than another fills up with padding."""
    del attention_tokens
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    unit = sequence_multiple * total_multiple
    capacity = micro_batch_tokens // unit * unit
    sizes = [slots(sample.length, sequence_multiple) for sample in samples]
    ranks: list[list[list[Bin]]] = [[] for _ in range(replicas)]
    loss_tokens = []
    for first in range(0, len(order), mini_batch):
        batch = order[first : first + mini_batch]
        dealt = [_in_order(batch[rank::replicas], sizes, capacity) for rank in range(replicas)]
        most = max(map(len, dealt))
        for mini_batches, bins in zip(ranks, dealt, strict=True):
            mini_batches.append(bins + [[] for _ in range(most - len(bins))])
        loss_tokens.append(sum(samples[index].loss_tokens for index in batch))
    return Packed(samples, ranks, loss_tokens, sequence_multiple, total_multiple)


def _in_order(indices: Sequence[int], sizes: Sequence[int], capacity: int) -> list[Bin]:
    bins: list[Bin] = []
    room = 0
    for index in indices:
        if sizes[index] > room:
            bins.append([])
            room = capacity
        bins[-1].append(index)
        room -= sizes[index]
    return bins


def worst(stats: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: max(one[name] for one in stats) for name in stats[0]}


def row(name: str, stats: dict[str, float], seconds: Sequence[float]) -> str:
    return (
        f"  {name:12} {stats['pack/waste']:9.2%} {stats['pack/imbalance_tokens']:13.2%} "
        f"{stats['pack/imbalance_cost']:13.2%} {stats['pack/micro_batches']:13.2f} "
        f"{median(seconds):8.2f} {max(seconds):8.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="shuffles of each setting")
    arguments = parser.parse_args()
    samples = rollout(arguments.seed)
    lengths = [sample.length for sample in samples]
    padded = 1 - sum(lengths) / (max(lengths) * len(lengths))
    print(f"{sum(lengths):,} tokens in {len(samples):,} sequences (padded to the longest, {padded:.0%} would be waste)")
    print(
        f"{RANKS} ranks, micro-batches of {BUDGET:,} tokens, {arguments.rounds} shuffles, of which the worst is shown"
    )
    print(f"\n  {'':12} {'waste':>9} {'imbalance':>13} {'imbalance':>13} {'micro-batches':>13} {'seconds':>17}")
    print(f"  {'':12} {'':9} {'in tokens':>13} {'in cost':>13} {'per update':>13} {'median':>8} {'slowest':>8}")
    print(f"  {'target':12} {MAX_WASTE:9.2%} {MAX_IMBALANCE:13.2%} {MAX_IMBALANCE:13.2%} {'':13} {MAX_SECONDS:8.2f}")

    missed = 0
    for mini_batch, (layout, multiples), model in product((512, RESPONSES), LAYOUTS.items(), ATTENTION_TOKENS):
        attention_tokens = ATTENTION_TOKENS[model]
        print(f"mini-batch {mini_batch:,}, {layout}, {model}: attention_tokens {attention_tokens:,}")
        for name, packer in (("ours", pack), ("naive", naive)):
            stats, seconds = [], []
            for number in range(arguments.rounds):
                started = time.perf_counter()
                packed = packer(
                    samples,
                    mini_batch=mini_batch,
                    micro_batch_tokens=BUDGET,
                    replicas=RANKS,
                    seed=f"{arguments.seed}:{number}",
                    sequence_multiple=multiples[0],
                    total_multiple=multiples[1],
                    attention_tokens=attention_tokens,
                )
                for rank in range(RANKS):
                    packed.share(rank)
                seconds.append(time.perf_counter() - started)
                stats.append(values(packing(packed, attention_tokens)))
            shown = worst(stats)
            print(row(name, shown, seconds))
            if packer is pack:
                imbalance = max(shown["pack/imbalance_tokens"], shown["pack/imbalance_cost"])
                missed += shown["pack/waste"] > MAX_WASTE or imbalance > MAX_IMBALANCE or median(seconds) > MAX_SECONDS
    print(f"{missed} settings miss a target" if missed else "all targets met")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
