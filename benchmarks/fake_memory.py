"""Memory of one rank that trains Qwen2.5-32B, for ways to recompute activations and to keep Adam's state; no GPU.

    python -m benchmarks.fake_memory

128 ranks, TP 8 with sequence parallel, DP 16; a micro-batch of 32,768 tokens in sequences of 4,096, all of them scored,
in bfloat16 with float32 gradients and Adam's state split over the replicas. The real actor is built and differentiated
under fake tensors (`tests.helpers.fake_mesh`), with the CPU layer spec: activations without recompute are more than
Transformer Engine's fused layers keep, and that module's docstring says by what. "remainders" is full recompute with
optimizer.precision_aware, "bf16 Adam" has both moments in bfloat16 as well. "gathered" are the parameters that the
optimizer's step gathers from the replicas.

A choice fits where the sum leaves 6 GiB of a card's 80 GB (80e9 bytes, 74.5 GiB) for what is not seen here: NCCL's
buffers, the CUDA context, workspaces of kernels and fragmentation. FLOPs are those of matrix products, without
attention.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from typing import Any

from dapo_megatron.config import Config
from dapo_megatron.config_file import parse
from tests.helpers.fake_mesh import RankCost, fake_rank_cost

QWEN2_5_32B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 5_120,
    "intermediate_size": 27_648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "vocab_size": 152_064,
    "tie_word_embeddings": False,
}
RANKS, TP, TOKENS, SEQUENCE = 128, 8, 32_768, 4_096
GIB = 2**30
CARD, RESERVE = 80e9, 6 * GIB

CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "none": {"memory": {"recompute": "none"}},
    "mlp": {"memory": {"recompute": "selective"}},
    "48 layers": {"memory": {"recompute": "full", "recompute_layers": 48}},
    "full": {"memory": {"recompute": "full"}},
    "remainders": {"memory": {"recompute": "full"}, "optimizer": {"precision_aware": True}},
    "bf16 Adam": {
        "memory": {"recompute": "full"},
        "optimizer": {
            "precision_aware": True,
            "exp_avg_dtype": "bfloat16",
            "exp_avg_sq_dtype": "bfloat16",
            "betas": [0.9, 0.95],
        },
    },
}
"""Name of a row -> the sections of the configuration that make it."""


def config(sections: dict[str, dict[str, Any]]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "model": {"path": "Qwen2.5-32B"},
        "data": {"train": "unused.jsonl"},
        "parallel": {"tp": TP, "sequence_parallel": True},
        "rollout": {"prompts": 512, "responses": 16},
        "train": {"micro_batch_tokens": TOKENS},
    }
    return parse({name: values.get(name, {}) | sections.get(name, {}) for name in values | sections})


def row(name: str, cost: RankCost, seconds: float) -> str:
    gathered = sum(one.bytes for one in cost.step_collectives)
    parts = (gathered, cost.parameter_bytes, cost.gradient_bytes, cost.optimizer_bytes, cost.activation_bytes)
    sizes = "".join(f"{size / GIB:>12.2f}" for size in (*parts, cost.peak_bytes))
    fits = "yes" if cost.peak_bytes <= CARD - RESERVE else "no"
    return f"{name:<10}{sizes}{fits:>8}{cost.flops / 1e12:>10.1f}{seconds:>10.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=0, help="which of the ranks (default 0)")
    rank = parser.parse_args().rank
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same figures everywhere
    warnings.simplefilter("ignore")
    print(f"Qwen2.5-32B, rank {rank} of {RANKS}, TP {TP}, DP {RANKS // TP}, {TOKENS:,} tokens a micro-batch; GiB")
    heads = ("gathered", "parameters", "gradients", "optimizer", "activations", "sum")
    print(f"{'choice':<10}{''.join(f'{head:>12}' for head in heads)}{'fits':>8}{'TFLOP':>10}{'seconds':>10}")
    for name, sections in CHOICES.items():
        start = time.perf_counter()
        lengths = [SEQUENCE] * (TOKENS // SEQUENCE)
        cost = fake_rank_cost(QWEN2_5_32B, config(sections), world_size=RANKS, rank=rank, lengths=lengths)
        print(row(name, cost, time.perf_counter() - start), flush=True)
    print(f"fits: at most {(CARD - RESERVE) / GIB:.1f} GiB, 80 GB less {RESERVE // GIB} GiB that is not seen here")


if __name__ == "__main__":
    main()
