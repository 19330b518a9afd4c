"""How fast weights reach an engine, beside a plain broadcast of the same bytes by the same transport.

    python -m benchmarks.publish [--engine]

A model of the sizes of Qwen2.5-0.5B with random bfloat16 weights (988 MB). The leader's publisher sends them to an
engine in a process of its own. By default that is a stand-in (`tests.helpers.stand_in`). `--engine` is a real vLLM,
which is pushed to besides. Both sides have one thread.

- Seconds and GB/s of a push, checksums of every tensor on both sides included, and of the plain broadcast: buffers of
  bucket_mib that are there already, one after the other, nothing read and nothing checked. They take turns in one run;
  medians. Their ratio is the target.
- CPU seconds of both processes together for either: where others use the machine, wall clocks say little.
- Memory of the leader: the highest point during a push less that before, in buckets.
- A push of weights that have not changed.
- The share of bfloat16 elements that one step of AdamW changes. Main parameters are float32, gradients random; the
  first step moves every one of them by the learning rate, later ones by less.

Gathering from shards is not part of it: the weights are whole. Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from dapo_megatron.config import WeightsConfig
from dapo_megatron.config_file import parse
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.weights.broadcast import BroadcastPublisher
from dapo_megatron.weights.buckets import describe
from dapo_megatron.weights.group import Group
from dapo_megatron.weights.publish import Publisher, open_publisher
from dapo_megatron.weights.verify import Inventory
from tests.helpers.stand_in import OneEngine, StandIn

MIN_RATIO, MAX_BUCKETS = 0.7, 2.0
VOCABULARY, HIDDEN, LAYERS, INTERMEDIATE, HEADS, KV_HEADS = 151_936, 896, 24, 4_864, 14, 2
RATES = (1e-6, 1e-4)


def weights_of(layers: int, vocabulary: int, seed: int = 0) -> dict[str, Tensor]:
    """Return random weights under Qwen2.5's names, in the order in which the actor exports them."""
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for layer in (f"model.layers.{index}" for index in range(layers)):
        shapes |= {
            f"{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            **{f"{layer}.self_attn.{x}_proj.weight": (HIDDEN if x == "q" else kv, HIDDEN) for x in "qkv"},
            **{f"{layer}.self_attn.{x}_proj.bias": (HIDDEN if x == "q" else kv,) for x in "qkv"},
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
            **{f"{layer}.mlp.{x}_proj.weight": (INTERMEDIATE, HIDDEN) for x in ("gate", "up")},
            f"{layer}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    shapes["model.norm.weight"] = (HIDDEN,)
    generator = torch.Generator().manual_seed(seed)
    return {name: random(shape, generator, norm="norm" in name) for name, shape in shapes.items()}


def random(shape: tuple[int, ...], generator: torch.Generator, *, norm: bool) -> Tensor:
    """A million numbers, over and over: more would only take longer."""
    numbers = float(norm) + 0.02 * torch.randn(min(1 << 20, math.prod(shape)), generator=generator)
    return numbers.bfloat16().repeat(-(-math.prod(shape) // len(numbers)))[: math.prod(shape)].view(shape).clone()


def broadcast(engine: StandIn, group: Group, nbytes: int, bucket_bytes: int) -> None:
    """Send `nbytes` in buffers of `bucket_bytes`, back to back."""
    room = torch.zeros(bucket_bytes, dtype=torch.uint8, device=group.device)
    sizes = [bucket_bytes] * (nbytes // bucket_bytes) + [nbytes % bucket_bytes] * (nbytes % bucket_bytes > 0)
    for size in sizes:
        engine.start("plain", size)
        group.wait([group.transmit(room[:size])])
        engine.done()


def group_of(publisher: Publisher) -> Group:
    """The group that a publisher sends through."""
    assert isinstance(publisher, BroadcastPublisher) and publisher._sender
    return publisher._sender.carrier.group  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def growth() -> Iterator[list[int]]:
    """Put into the list that it yields by how many bytes this process' memory grows at the most."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest point
    before, found = status("VmRSS"), []
    yield found
    found.append(status("VmHWM") - before)


def status(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def changed_share(lr: float, elements: int = 1 << 24) -> float:
    """Return the share of bfloat16 elements that are others after a step of AdamW."""
    generator = torch.Generator().manual_seed(0)
    main = torch.nn.Parameter(0.02 * torch.randn(elements, generator=generator))
    main.grad = torch.randn(elements, generator=generator)
    before = main.detach().bfloat16()
    torch.optim.AdamW([main], lr=lr, betas=(0.9, 0.999), weight_decay=0.1).step()
    return (main.detach().bfloat16() != before).float().mean().item()


def vllm(layers: int, vocabulary: int, folder: Path) -> Engines:
    """Start a real engine with other weights of the same sizes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).bfloat16()
    model.save_pretrained(folder / "model")
    del model
    values = {
        "model": {"path": str(folder / "model"), "dtype": "bfloat16"},
        "data": {"train": "not-there.jsonl", "max_prompt_tokens": 64},
        "rollout": {"prompts": 4, "responses": 4, "max_response_tokens": 64},
        "train": {"mini_batch": 16, "micro_batch_tokens": 1024},
        "reward": {"overlong": {"punishment": False}},
        "engine": {"startup_seconds": 600},
    }
    return Engines(parse(values), folder, ranks=0)


def push_to_vllm(config: WeightsConfig, inventory: Inventory, weights: Mapping[str, Tensor], options: Any) -> None:
    """Time pushes to a real vLLM, the first of which also joins."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        engines = stack.enter_context(closing(vllm(options.layers, options.vocabulary, Path(folder))))
        engines.wait_ready()
        publisher = stack.enter_context(closing(open_publisher(config, inventory, engines)))
        for version in range(1, options.pushes + 1):
            for tensor in weights.values():
                tensor.neg_()
            found = {name: measure.value for name, measure in publisher.push(weights.items(), version).items()}
            print(f"vLLM, push {version}: {found['push/seconds']:.2f} s, {found['push/gb_per_second']:.2f} GB/s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--bucket-mib", type=int, default=WeightsConfig().bucket_mib)
    parser.add_argument("--pushes", type=int, default=5)
    parser.add_argument("--verify", choices=("checksums", "off"), default="checksums")
    parser.add_argument("--engine", action="store_true", help="push to a real vLLM, too")
    options = parser.parse_args()
    torch.set_num_threads(1)

    weights = weights_of(options.layers, options.vocabulary)
    nbytes = sum(tensor.nbytes for tensor in weights.values())
    inventory = Inventory(**describe(list(weights.items())))
    config = WeightsConfig(bucket_mib=options.bucket_mib, verify=options.verify)
    bucket_bytes = options.bucket_mib << 20
    print(f"{nbytes / 1e6:,.0f} MB in {len(weights)} tensors, buckets of {options.bucket_mib} MiB", flush=True)
    with ExitStack() as stack:
        engine = stack.enter_context(closing(StandIn()))
        publisher = open_publisher(config, inventory, OneEngine(engine))
        stack.enter_context(closing(publisher))
        pushes, broadcasts, extra = [], [], []
        for version in range(options.pushes):
            for tensor in weights.values():
                tensor.neg_()
            with growth() as grown:
                pushes.append(timed(engine, lambda version=version: publisher.push(weights.items(), version)))
            extra.append(grown[0])
            group = group_of(publisher)
            broadcasts.append(timed(engine, lambda group=group: broadcast(engine, group, nbytes, bucket_bytes)))
        unchanged = timed(engine, lambda: publisher.push(weights.items(), options.pushes))
    push, plain = (statistics.median(seconds for seconds, _ in times) for times in (pushes, broadcasts))
    cpu = [statistics.median(seconds for _, seconds in times) for times in (pushes, broadcasts)]
    ratio, buckets = plain / push, max(extra) / bucket_bytes
    print(f"push:            {push:.2f} s, {nbytes / push / 1e9:.2f} GB/s, {cpu[0]:.2f} CPU seconds")
    print(f"plain broadcast: {plain:.2f} s, {nbytes / plain / 1e9:.2f} GB/s, {cpu[1]:.2f} CPU seconds")
    print(f"ratio:           {ratio:.2f} (target: {MIN_RATIO}); by CPU seconds {cpu[1] / cpu[0]:.2f}")
    print(f"extra memory of the leader: {buckets:.2f} buckets (target: {MAX_BUCKETS:g})")
    print(f"unchanged push:  {unchanged[0]:.2f} s, nothing sent")
    for lr in RATES:
        print(f"changed by a step of AdamW at {lr:g}: {changed_share(lr):.2%} of bfloat16 elements")
    if options.engine:
        push_to_vllm(config, inventory, weights, options)
    return int(ratio < MIN_RATIO or buckets > MAX_BUCKETS)


def timed(engine: StandIn, work: Callable[[], object]) -> tuple[float, float]:
    """Return seconds by the clock, and CPU seconds of both processes."""
    cpu, started = engine.cpu_seconds(), time.perf_counter()
    work()
    return time.perf_counter() - started, engine.cpu_seconds() - cpu


if __name__ == "__main__":
    sys.exit(main())
