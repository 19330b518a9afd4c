"""Seconds and memory of the log-prob pass on a GPU at the vocabulary of Qwen2.5, beside the plain way in PyTorch.

    python -m benchmarks.gpu_logprob

The pass: log-probs of the labels, entropy, and the gradient of the logits, from logits [8192, 152064]. The plain way is
`logprob_memory.plain`: log_softmax over a float32 copy, gather, and autograd. Sides take turns; the median counts.
Memory is the most that torch allocated, the logits included. `floor` is what reading the logits twice and writing them
once takes at the speed of a copy that is measured in the same run: the least that this pass can take.

Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import sys
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from benchmarks.gpu_shapes import card, seconds, verdict
from benchmarks.logprob_memory import DTYPES, SIDES, TEMPERATURE, VOCABULARY, LogprobsAndEntropy

MAX_SHARE = 1 / 3
"""Of the plain way's memory."""
MIN_SPEEDUP = 1.0


def one_pass(side: LogprobsAndEntropy, logits_TV: Tensor, labels_T: Tensor) -> tuple[float, int, Tensor]:
    """Seconds, the most bytes that were allocated, and a row of the gradient. Leaves the logits to be filled again."""
    logits_TV = logits_TV.detach().requires_grad_()
    torch.cuda.reset_peak_memory_stats()

    def work() -> None:
        logprobs_T, _ = side(logits_TV, labels_T)
        logprobs_T.sum().backward()

    taken = seconds(work)
    assert logits_TV.grad is not None
    return taken, torch.cuda.max_memory_allocated(), logits_TV.grad[0].float().clone()


def report(tokens: int, rounds: int) -> bool:
    print(f"{card()}: log-prob pass, forward and backward, logits [{tokens}, {VOCABULARY}], temperature {TEMPERATURE}")
    met = [compare(name, tokens, rounds) for name in DTYPES]
    return all(met)


def compare(name: str, tokens: int, rounds: int) -> bool:
    torch.manual_seed(0)
    labels_T = torch.randint(VOCABULARY, (tokens,), device="cuda")
    source_TV = torch.randn(tokens, VOCABULARY, device="cuda", dtype=DTYPES[name]).mul_(4)
    logits_TV = torch.empty_like(source_TV)
    size = source_TV.nbytes
    floor = 3 / 2 * median(seconds(lambda: logits_TV.copy_(source_TV)) for _ in range(5))
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    peaks, rows = dict.fromkeys(SIDES, 0), {}
    for number in range(1 + rounds):
        for side, work in SIDES.items():
            logits_TV.copy_(source_TV)  # ours writes the gradient over the logits
            once, peak, rows[side] = one_pass(work, logits_TV, labels_T)
            if number:
                taken[side].append(once)
                peaks[side] = max(peaks[side], peak - size)
    torch.testing.assert_close(rows["ours"], rows["plain"], rtol=2e-2, atol=1e-3)
    for side in SIDES:
        once = median(taken[side])
        print(
            f"  {name:>8} {side:>6}: {1e3 * once:8.2f} ms ({once / floor:.1f} x floor {1e3 * floor:.2f} ms), peak "
            f"{peaks[side] / 2**30:6.2f} GiB = {peaks[side] / size:.2f} x logits"
        )
    share, faster = peaks["ours"] / peaks["plain"], median(taken["plain"]) / median(taken["ours"])
    met = (
        verdict(f"{name}: memory {share:.2f} of the plain way's, at most {MAX_SHARE:.2f}", share <= MAX_SHARE),
        verdict(f"{name}: {faster:.2f} times as fast, at least {MIN_SPEEDUP:.1f}", faster >= MIN_SPEEDUP),
    )
    return all(met)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_logprob: torch sees no GPU; benchmarks.logprob_memory is the CPU's")
    dist.init_process_group("nccl", store=HashStore(), rank=0, world_size=1)
    met = report(arguments.tokens, arguments.rounds)
    dist.destroy_process_group()
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
