"""How fast weights go from a rank to an engine's worker between GPUs, beside a copy within one.

    python -m benchmarks.gpu_publish

Random weights of some layers of Qwen2.5-7B, and its vocabulary, are pushed into a process that takes them as an
engine's worker does (`tests.helpers.stand_in`): by CUDA IPC on one GPU, and over NCCL to a second one, where there is
one. GB/s are bytes of the weights over the whole push, for some sizes of buckets, with checksums on both sides and
without.

A device copy reads each byte once and writes it once. A push by CUDA IPC does that three times: into the room of the
rank, out of it, and into the parameters. So a third of a device copy is the most that it can come to.

Gathering from shards is not part of it: the weights are whole. Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_shapes import SHAPES, card, seconds, verdict
from benchmarks.publish import broadcast, group_of
from dapo_megatron.config import WeightsConfig
from dapo_megatron.weights.buckets import describe
from dapo_megatron.weights.publish import open_publisher
from dapo_megatron.weights.verify import Inventory
from tests.helpers.stand_in import OneEngine, OneRank, StandIn, random_weights

MIN_OF_COPY = 0.3
"""Of a device copy, without checksums and with the largest buckets, by CUDA IPC."""
MIN_OF_BROADCAST = 0.7
"""Of a plain broadcast through the same group, the same, over NCCL."""
DEVICES = {"ipc": "cuda:0", "nccl": "cuda:1"}
"""Of the worker."""


def weights_of(shape: dict[str, Any], layers: int) -> dict[str, Tensor]:
    """Return random weights under Qwen2.5's names, on the first GPU."""
    hidden, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    kv = hidden // heads * shape["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape["vocab_size"], hidden)}
    for layer in (f"model.layers.{index}" for index in range(layers)):
        shapes |= {
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.input_layernorm.weight": (hidden,),
            **{f"{layer}.self_attn.{x}_proj.weight": (hidden if x == "q" else kv, hidden) for x in "qkv"},
            **{f"{layer}.self_attn.{x}_proj.bias": (hidden if x == "q" else kv,) for x in "qkv"},
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            **{f"{layer}.mlp.{x}_proj.weight": (inner, hidden) for x in ("gate", "up")},
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
        }
    return random_weights(shapes, "cuda:0")


def copy_rate(nbytes: int = 1 << 30, repeats: int = 10) -> float:
    """Return bytes a second of a copy within a GPU."""
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device="cuda:0") for _ in range(2))
    target.copy_(source)
    return nbytes / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(repeats))


def measure(
    transport: str, weights: dict[str, Tensor], bucket_mib: int, verify: str, pushes: int
) -> tuple[float, float]:
    """Return bytes a second of a push, and over NCCL of a plain broadcast in buffers of a bucket; 0 otherwise."""
    config = WeightsConfig.model_validate(
        {"transport": transport, "bucket_mib": bucket_mib, "verify": verify, "delta": False}
    )
    nbytes = sum(tensor.nbytes for tensor in weights.values())
    taken, plain = [], []
    inventory, ranks = Inventory(**describe(list(weights.items()))), OneRank("cuda:0")
    with (
        closing(StandIn(DEVICES[transport])) as engine,
        closing(open_publisher(config, inventory, OneEngine(engine), ranks=ranks, workers=1)) as publisher,
    ):
        for version in range(pushes + 1):  # the first one warms up
            taken.append(seconds(lambda version=version: publisher.push(weights.items(), version)))
            if transport == "nccl":
                group = group_of(publisher)
                plain.append(seconds(lambda group=group: broadcast(engine, group, nbytes, bucket_mib << 20)))
    return nbytes / statistics.median(taken[1:]), nbytes / statistics.median(plain[1:]) if plain else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--bucket-mib", type=int, nargs="+", default=[64, 512, 1024])
    parser.add_argument("--pushes", type=int, default=3)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"{sys.executable}: torch {torch.__version__} sees no GPU; this bench is for machines with one")
    weights = weights_of(SHAPES[arguments.shape], arguments.layers)
    nbytes = sum(tensor.nbytes for tensor in weights.values())
    copy = copy_rate()
    print(f"{card()}: {nbytes / 1e9:.2f} GB in {len(weights)} tensors; a device copy: {copy / 1e9:,.0f} GB/s")
    met = True
    for transport in ("ipc", "nccl") if torch.cuda.device_count() > 1 else ("ipc",):
        rate = plain = 0.0
        for bucket_mib in sorted(arguments.bucket_mib):
            for verify in ("checksums", "off"):
                rate, plain = measure(transport, weights, bucket_mib, verify, arguments.pushes)
                beside = f", plain broadcast {plain / 1e9:,.1f} GB/s" if plain else ""
                print(
                    f"{transport}, buckets of {bucket_mib} MiB, weights.verify={verify}: {rate / 1e9:,.1f} GB/s, "
                    f"{rate / copy:.1%} of a device copy{beside}"
                )
        wanted, of, what = (MIN_OF_BROADCAST, plain, "plain broadcast") if plain else (MIN_OF_COPY, copy, "device copy")
        met &= verdict(f"{transport} at {rate / of:.0%} of a {what}, at least {wanted:.0%}", rate >= wanted * of)
    if torch.cuda.device_count() < 2:
        print("nccl: not measured, because it takes two GPUs")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
