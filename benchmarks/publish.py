"""How fast weights reach an engine, beside a plain broadcast of the same bytes by the same transport.

    python -m benchmarks.publish [--engine]

A model of the sizes of Qwen2.5-0.5B with random bfloat16 weights (988 MB). The leader's publisher sends them to an
engine in a process of its own. By default that is a stand-in: it takes part as an engine's worker does, with the same
accounts (`weights.verify.Arrivals`), and loads what comes by copying it into parameters of its own, as an engine that
keeps tensors as they come. `--engine` is a real vLLM, which is pushed to besides. Both sides have one thread.

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
import asyncio
import math
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from dapo_megatron.config import WeightsConfig
from dapo_megatron.config_file import parse
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.weights.buckets import Named, describe
from dapo_megatron.weights.gloo import GlooPublisher, join_group, transmit
from dapo_megatron.weights.inbox import Inbox
from dapo_megatron.weights.publish import open_publisher
from dapo_megatron.weights.verify import Arrivals, Inventory

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


class StandIn:
    """An engine as the publisher sees it, in a process of its own."""

    name, workers, keeps = "stand-in", 1, True

    def __init__(self) -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=work, args=(other,), daemon=True)
        self._process.start()

    async def _ask(self, what: str, info: Any = None) -> Any:
        self._pipe.send((what, info))
        loop, answered = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._pipe.fileno(), answered.set)
        try:
            await answered.wait()
        finally:
            loop.remove_reader(self._pipe.fileno())
        error, answer = self._pipe.recv()
        if error:
            raise RuntimeError(error)
        return answer

    async def join_group(self, info: dict[str, Any]) -> None:
        await self._ask("join", info)

    async def begin_transfer(self) -> None:
        await self._ask("begin")

    async def receive(self, info: dict[str, Any]) -> None:
        await self._ask("receive", {key: info[key] for key in ("tensors", "checksums", "kept")})

    async def finish_transfer(self, version: int) -> None:
        await self._ask("finish")

    def plain(self, nbytes: int) -> None:
        """Have it take part in a plain broadcast into a buffer that it has."""
        self._pipe.send(("plain", nbytes))

    def done(self) -> None:
        error, _ = self._pipe.recv()
        if error:
            raise RuntimeError(error)

    def cpu_seconds(self) -> float:
        """Of this process and that of the engine."""
        self._pipe.send(("cpu_seconds", None))
        _, seconds = self._pipe.recv()
        return time.process_time() + seconds

    def close(self) -> None:
        self._process.kill()
        self._process.join()


class OneEngine:
    """`Receivers` without watchers."""

    def __init__(self, engine: StandIn) -> None:
        self._engine, self._runner = engine, asyncio.Runner()

    def __iter__(self) -> Iterator[StandIn]:
        return iter([self._engine])

    def run(self, work: Coroutine[Any, Any, Any], /) -> Any:
        return self._runner.run(work)


class Worker:
    """The stand-in's side, with the calls that vLLM's worker gets (`weights.workers.vllm`)."""

    def join(self, info: Mapping[str, Any]) -> None:
        info = dict(info)
        inventory, rank = info.pop("inventory"), info.pop("rank_offset")
        self.arrivals = Arrivals(inventory)
        self.group = join_group(rank=rank, **info)
        self.inbox = Inbox(self.group, self.arrivals, self.load)
        self.parameters = {
            name: torch.zeros(shape, dtype=getattr(torch, dtype))
            for name, dtype, shape in zip(inventory["names"], inventory["dtypes"], inventory["shapes"], strict=True)
        }
        self.room = torch.zeros(0, dtype=torch.uint8)

    def load(self, bucket: Named) -> None:
        for name, tensor in bucket:
            self.parameters[name].copy_(tensor)

    def begin(self, _: None) -> None:
        self.arrivals.begin()
        self.inbox.begin()

    def receive(self, info: Mapping[str, Any]) -> None:
        self.inbox.receive(info["tensors"], info["checksums"], info["kept"])

    def finish(self, _: None) -> None:
        self.inbox.finish()
        self.arrivals.end()
        self.arrivals.loaded(self.parameters, {})

    def cpu_seconds(self, _: None) -> float:
        return time.process_time()

    def plain(self, nbytes: int) -> None:
        if nbytes > len(self.room):
            self.room = torch.zeros(nbytes, dtype=torch.uint8)
        transmit(self.group, self.room[:nbytes]).wait()


def work(pipe: Connection) -> None:
    torch.set_num_threads(1)
    worker = Worker()
    while True:
        try:
            what, info = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, getattr(worker, what)(info)))
        except Exception as error:  # told to the leader, whatever it is
            pipe.send((f"{type(error).__name__}: {error}", None))


def broadcast(engine: StandIn, group: Any, nbytes: int, bucket_bytes: int) -> None:
    """Send `nbytes` in buffers of `bucket_bytes`, back to back."""
    room = torch.zeros(bucket_bytes, dtype=torch.uint8)
    sizes = [bucket_bytes] * (nbytes // bucket_bytes) + [nbytes % bucket_bytes] * (nbytes % bucket_bytes > 0)
    for size in sizes:
        engine.plain(size)
        transmit(group, room[:size]).wait()
        engine.done()


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
    parser.add_argument("--bucket-mib", type=int, default=64)
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
        assert isinstance(publisher, GlooPublisher) and publisher._sender
        stack.enter_context(closing(publisher))
        pushes, broadcasts, extra = [], [], []
        for version in range(options.pushes):
            for tensor in weights.values():
                tensor.neg_()
            with growth() as grown:
                pushes.append(timed(engine, lambda version=version: publisher.push(weights.items(), version)))
            extra.append(grown[0])
            group = publisher._sender._group
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
