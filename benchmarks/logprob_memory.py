"""Peak memory and seconds of the log-prob pass at the vocabulary of Qwen2.5, beside the plain way in PyTorch.

    python -m benchmarks.logprob_memory

The pass: log-probs of the labels, entropy, and the gradient of the logits, from logits [1024, 152064]. The plain way is
log_softmax over a float32 copy, gather, entropy from the same log_softmax, and autograd. Each runs in a process of its
own. Memory is what Linux saw: the peak resident size of the process (VmHWM), less that before the logits were made. So
the logits count on both sides, and temporaries inside torch's operations too.

Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from dapo_megatron.actor.logprobs import vocab_parallel_logprobs

ROOT = Path(__file__).parents[1]
TOKENS, VOCABULARY, TEMPERATURE = 1_024, 152_064, 0.9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_SHARE = 1 / 3

LogprobsAndEntropy = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    scores = vocab_parallel_logprobs(
        logits_TV,
        labels_T,
        temperature=TEMPERATURE,
        vocab_size=logits_TV.shape[1],
        tp_group=dist.group.WORLD,  # pyright: ignore[reportArgumentType]
        with_stats=True,
    )
    assert scores.entropy_T is not None
    return scores.logprobs_T, scores.entropy_T


def plain(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    log_p_TV = torch.log_softmax(logits_TV.float() / TEMPERATURE, -1)
    entropy_T = -(log_p_TV.detach().exp() * log_p_TV.detach()).sum(-1)
    return log_p_TV.gather(1, labels_T[:, None]).squeeze(1), entropy_T


SIDES: dict[str, LogprobsAndEntropy] = {"ours": ours, "plain": plain}


def peak_bytes() -> int:
    """Not ru_maxrss, which a new process takes over from the one that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def one_pass(side: LogprobsAndEntropy, dtype: torch.dtype, tokens: int, vocabulary: int) -> dict[str, float]:
    """Bytes above those of before, seconds of both directions, and results to compare."""
    before = peak_bytes()
    generator = torch.Generator().manual_seed(0)
    logits_TV = torch.empty(tokens, vocabulary, dtype=dtype)
    for row_V in logits_TV:  # one by one, so that making them is not the peak
        row_V.copy_(4 * torch.randn(vocabulary, generator=generator))
    logits_TV.requires_grad_()
    labels_T = torch.randint(vocabulary, (tokens,), generator=generator)
    started = time.perf_counter()
    logprobs_T, entropy_T = side(logits_TV, labels_T)
    logprobs_T.sum().backward()
    seconds = time.perf_counter() - started
    assert logits_TV.grad is not None
    return {
        "bytes": peak_bytes() - before,
        "seconds": seconds,
        "logprob": logprobs_T.mean().item(),
        "entropy": entropy_T.mean().item(),
        "gradient": logits_TV.grad[0].float().norm().item(),
    }


def in_new_process(side: str, dtype: str, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.logprob_memory", "--one", side, dtype, "--threads", str(threads)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(threads: int) -> bool:
    """Print the table; whether every target is met."""
    met = True
    print(f"log-prob pass, forward and backward, logits [{TOKENS}, {VOCABULARY}], peak memory (logits included)")
    for dtype, torch_dtype in DTYPES.items():
        results = {side: in_new_process(side, dtype, threads) for side in SIDES}
        for name in ("logprob", "entropy", "gradient"):
            assert math.isclose(results["ours"][name], results["plain"][name], rel_tol=1e-3), f"not alike: {results}"
        logits = TOKENS * VOCABULARY * torch_dtype.itemsize
        for side, result in results.items():
            size = result["bytes"]
            print(f"  {dtype:>8} {side:>6}: {size / 2**20:6,.0f} MiB = {size / logits:.2f} x logits", end="")
            print(f", {result['seconds']:.2f} s")
        share = results["ours"]["bytes"] / results["plain"]["bytes"]
        met &= share <= MAX_SHARE
        print(f"  {dtype:>8} ours / plain: {share:.3f} (target: at most {MAX_SHARE:.3f})", flush=True)
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "DTYPE"), help="measure one side in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.one:
        sys.exit(0 if report(arguments.threads) else 1)
    side, dtype = SIDES[arguments.one[0]], DTYPES[arguments.one[1]]
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    one_pass(side, dtype, 8, 1_000)  # threads, libraries
    print(json.dumps(one_pass(side, dtype, TOKENS, VOCABULARY)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
