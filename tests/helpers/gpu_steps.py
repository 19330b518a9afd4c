"""Steps of a run on a GPU that does not exist (`fake_cuda`), and what was seen of them."""

from __future__ import annotations

import asyncio
import math
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dapo_megatron.check_reduction.pool import RankPool
from dapo_megatron.measures import Max, Measure, Sum
from dapo_megatron.types import MicroBatch, TokenLoss
from tests.helpers.batches import make_micro_batch, make_mini_batch, ratio_loss
from tests.helpers.fake_cuda import FakeGpu, fake_gpu
from tests.helpers.models import make_config, save_qwen2

POOL = RankPool()
"""Processes whose megatron.core has seen a GPU, and that `cpu.enable()` has not changed."""
LENGTHS = [[5, 30, 1], [20, 4]]
"""Slots of the sequences of two micro-batches."""


@dataclass
class Facts:
    """What was seen in two steps of a run, each with one update; waits and memory are those of the second."""

    waits: dict[str, Counter[str]] = field(default_factory=dict)
    """Phase -> "module:function kind" -> how often the host waited there."""
    layers_get: set[str] = field(default_factory=set)
    """Devices of all tensors that a module of the model is called with, also inside PackedSeqParams."""
    state: dict[str, set[str]] = field(default_factory=dict)
    """Devices of parameters, gradients, and what the optimizer keeps."""
    batches: set[str] = field(default_factory=set)
    """Devices of the mini-batch between the actor's passes."""
    skipped: str | None = None
    away: tuple[int, int] = (0, 0)
    """Bytes of parameters, gradients and moments inside `Actor.away`; how often memory was given back there."""
    saved: list[str] = field(default_factory=list)
    """Names in the file of a skipped mini-batch."""
    buckets: dict[str, set[str]] = field(default_factory=dict)
    """Transport -> devices of what is sent to the engines."""


def steps(folder: Path, *, ranks: int = 1, rank: int = 0, depth: int = 2, loss: str = "", **sections: Any) -> Facts:
    """Make two steps as `rank` of `ranks`.

    Args:
        depth: layers of the model.
        loss: one of LOSSES instead of what the config names.
    """
    dtype = sections.setdefault("model", {}).setdefault("dtype", "bfloat16")
    path = save_qwen2(folder / f"model-{depth}-{dtype}", layers=depth, dtype=getattr(torch, dtype))
    sections["model"]["layers"] = "torch"
    return POOL.run(1, _steps, path, sections, ranks, rank, loss, timeout=100)[0]


@contextmanager
def rank_on_a_gpu(parallel: dict[str, Any], ranks: int, rank: int) -> Iterator[tuple[FakeGpu, Any]]:
    from torch._C._distributed_c10d import HashStore

    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": ranks}
    with patch.dict(os.environ, {name: str(value) for name, value in place.items()}), fake_gpu() as gpu:
        from megatron.core import parallel_state

        from dapo_megatron.actor import cpu, topology
        from dapo_megatron.config import ParallelConfig

        assert not cpu._enabled, "megatron.core runs on CPU in this process"
        topo = topology.initialize(ParallelConfig(**parallel), store=HashStore())
        try:
            yield gpu, topo
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def _flats(checkpoint: Any, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> list[Tensor]:
    """Return what the leader sends in a push: large tensors, and small ones together."""
    from dapo_megatron.weights.broadcast import TwoRooms
    from dapo_megatron.weights.buckets import numbered
    from dapo_megatron.weights.delta import Delta
    from dapo_megatron.weights.outgoing import Outgoing

    outgoing = Outgoing(checkpoint.inventory, TwoRooms(1 << 20, device), with_sums=True)

    async def made() -> list[Tensor]:
        buckets = outgoing.buckets(numbered(weights, 1 << 20), Delta(active=True))
        return [flat async for bucket in buckets for flat in bucket.flats]

    return asyncio.run(made())


def _steps(path: Path, sections: dict[str, Any], ranks: int, rank: int, loss: str) -> Facts:
    parallel = sections.get("parallel", {})
    with rank_on_a_gpu(parallel, ranks, rank) as (gpu, topo):
        from dapo_megatron.actor.actor import Actor
        from dapo_megatron.algo.objective import Objective
        from dapo_megatron.algo.weighing import weigh
        from dapo_megatron.skipped import save_skipped
        from dapo_megatron.weights.hf import HfCheckpoint

        config, checkpoint, facts = make_config(path, **sections), HfCheckpoint(path), Facts()
        objective = LOSSES[loss] if loss else Objective(config.algo)

        def phase(name: str) -> AbstractContextManager[None]:
            return _waits(gpu, facts.waits, name)

        actor = Actor(config, topo, checkpoint)
        reference = Actor(config, topo, checkpoint, trainable=False) if config.algo.kl.coef else None
        watch_inputs(actor, facts.layers_get)
        multiple = config.parallel.sequence_multiple * config.parallel.total_multiple
        given = make_mini_batch(
            [make_micro_batch(lengths, seed=index, multiple=multiple) for index, lengths in enumerate(LENGTHS)]
        )
        mini_batch = given
        for _ in range(2):
            emptied = gpu.emptied
            with phase("away"), actor.away():
                held = sum(tensor.untyped_storage().nbytes() for kind in _state(actor).values() for tensor in kind)
                facts.away = held, gpu.emptied - emptied
            with phase("logprobs"):
                mini_batches, _ = actor.with_old_logprobs([given])
            facts.batches |= devices_of(mini_batches)
            with phase("weighing"):
                (mini_batch,), _ = weigh(mini_batches, config.algo, topo)
            if reference:
                with phase("reference"):
                    (mini_batch,) = reference.with_ref_logprobs([mini_batch])
            facts.batches |= devices_of(mini_batch)
            # Masks may have changed with log-probs that are not real.
            mini_batch = make_mini_batch(mini_batch.micro_batches)
            gpu.count = mini_batch.loss_tokens
            with phase("update"):
                facts.skipped = actor.update(mini_batch, objective, lr=1e-3).skipped
        facts.state = {kind: devices_of(tensors) for kind, tensors in _state(actor).items()}
        if facts.skipped:
            file = save_skipped(path / "run", 1, 0, facts.skipped, [mini_batch])
            from safetensors.torch import load_file

            facts.saved = sorted(load_file(file)) if file else []
        for transport, device in (("gloo", "cpu"), ("nccl", "cuda:0")):
            with phase(f"publish over {transport}"):
                weights = checkpoint.export(actor.chunks)
                if topo.is_leader:
                    facts.buckets[transport] = devices_of(_flats(checkpoint, weights, torch.device(device)))
                else:
                    deque(weights, maxlen=0)  # it takes part in gathering
        with actor.gradients_as_weights():
            facts.state["gradients as weights"] = devices_of(dict(checkpoint.export(actor.chunks)).values())
        return facts


@contextmanager
def _waits(gpu: FakeGpu, waits: dict[str, Counter[str]], phase: str) -> Iterator[None]:
    before = len(gpu.waits)
    yield
    waits[phase] = Counter(str(wait) for wait in gpu.waits[before:])


def watch_inputs(actor: Any, seen: set[str]) -> None:
    def look(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        seen.update(devices_of([args, kwargs]))

    for module in (module for chunk in actor.chunks for module in chunk.modules()):
        module.register_forward_pre_hook(look, with_kwargs=True)


def _state(actor: Any) -> dict[str, list[Tensor]]:
    optimizers = [part.optimizer for part in actor.optimizer.chained_optimizers]
    return {
        "parameters": [param for chunk in actor.chunks for param in chunk.parameters()],
        "gradients": [buffer.grad_data for module in actor._modules for buffer in module.buffers],
        "moments": [
            state[name]
            for optimizer in optimizers
            for state in optimizer.state.values()
            for name in ("exp_avg", "exp_avg_sq")
        ],
    }


def devices_of(value: Any) -> set[str]:
    """Devices of all tensors in a value."""
    if isinstance(value, Tensor):
        return {str(value.device)}
    if is_dataclass(value):
        value = [getattr(value, each.name) for each in fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, str) or not isinstance(value, Sequence):
        value = list(value) if type(value).__name__ == "dict_values" else []
    return {device for entry in value for device in devices_of(entry)}


def _measuring(measures: dict[str, Measure], logprobs_T: Tensor, batch: MicroBatch, *_: Any) -> TokenLoss:
    loss = ratio_loss(logprobs_T, batch)
    return TokenLoss(loss.loss_sum, loss.loss_tokens, measures)


LOSSES: dict[str, Any] = {
    # Both are allowed: a number is a number or a tensor. The first by name decides where all are brought together.
    "numbers": partial(_measuring, {"a sum": Sum(3.0), "largest": Max(0.5)}),
    "host": partial(_measuring, {"a sum": Sum(torch.ones(())), "largest": Max(torch.ones(()))}),
    "not finite": partial(_measuring, {"largest": Max(math.nan)}),
}
