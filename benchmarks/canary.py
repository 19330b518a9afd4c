"""How far a right engine's answers to the canary are from the actor's log-probs: what weights.canary_tolerance is for.

    python -m benchmarks.canary [--dtype bfloat16] [--parameters 1] [--pushes 24] [--kind vllm]

An actor of random weights, which change with every push, and an engine on this machine's CPU that gets them. Each push
gives one number: the mean of 16 |differences| in nats, which the tolerance is compared with. So many pushes give their
median and the largest, and the largest difference of a single token. Beside them, for scale, the same of an engine that
keeps the weights of the push before, each of which is changed by 2% of their standard deviation.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.deterministic import SHAPES, save_model
from dapo_megatron.actor import topology
from dapo_megatron.actor.actor import Actor
from dapo_megatron.canary import TOLERANCE, Canary
from dapo_megatron.config import ParallelConfig
from dapo_megatron.config_file import parse
from dapo_megatron.heartbeat import Peers
from dapo_megatron.leader import Leader
from dapo_megatron.measures import Measures, Sum
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.types import Prompt
from dapo_megatron.weights.hf import HfCheckpoint
from dapo_megatron.weights.publish import Publisher, open_publisher

SPREAD = 0.05
"""Standard deviation of the weights (`save_model`)."""
CHANGE = 0.02
"""That of what is added to each before a push, over that of the weights."""


def prompts(vocabulary: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, vocabulary, (9, 30), generator=generator).tolist()
    return [Prompt(f"p{index}", tuple(each), "", "") for index, each in enumerate(tokens)]


class Pushing:
    """A `Publisher` that leaves the engine as it is where it is told to."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher, self.deaf, self.close = publisher, False, publisher.close

    def push(self, weights: Iterable[tuple[str, Tensor]] | None, version: int) -> Measures:
        return {"seconds/verify": Sum(0.0)} if self.deaf else self._publisher.push(weights, version)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Return what the engine has -> for each push, the mean and the largest difference."""
    save_model(folder / "model", arguments.parameters)
    config = parse(
        {
            "model": {"path": str(folder / "model"), "dtype": arguments.dtype},
            "data": {"train": "unused.jsonl", "max_prompt_tokens": 200},
            "rollout": {"prompts": 4, "responses": 4, "max_response_tokens": 64},
            "train": {"mini_batch": 16, "micro_batch_tokens": 1024},
            "reward": {"overlong": {"punishment": False}},
            "engine": {"kind": arguments.kind, "startup_seconds": 3600},
            # What is measured is not to end this.
            "weights": {"push_seconds": 120, "canary_tolerance": 1e9},
        }
    )
    found: dict[str, list[tuple[float, float]]] = {"what was sent": [], "the weights before": []}
    with ExitStack() as stack:
        topo = topology.initialize(ParallelConfig())
        stack.callback(topology.shutdown)
        checkpoint = HfCheckpoint(config.model.path)
        actor = Actor(config, topo, checkpoint)
        engines = stack.enter_context(closing(Engines(config, folder, ranks=0)))
        engines.wait_ready()
        leader: Any = SimpleNamespace(config=config, engines=engines, _attention_tokens=math.inf)
        leader.pack = partial(Leader.pack, leader)
        publisher = Pushing(open_publisher(config.weights, checkpoint.inventory, engines))
        known = prompts(SHAPES[arguments.parameters]["vocab_size"])
        canary = stack.enter_context(closing(Canary(publisher, config, topo, actor, leader, known, Peers())))
        canary.push(checkpoint.export(actor.chunks), version=0)
        for version in range(1, arguments.pushes + 1):
            change(actor, version)
            for publisher.deaf, what in ((True, "the weights before"), (False, "what was sent")):
                measures = canary.push(checkpoint.export(actor.chunks), version - publisher.deaf)
                found[what].append((measures["verify/canary"].value, measures["verify/canary_max"].value))
    return found


def change(actor: Actor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in actor.chunks[0].parameters():
            param.add_(CHANGE * SPREAD * torch.randn(param.shape, generator=generator).to(param.dtype))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="bfloat16")
    parser.add_argument("--parameters", type=int, choices=sorted(SHAPES), default=1, help="millions")
    parser.add_argument("--pushes", type=int, default=24)
    parser.add_argument("--kind", default="vllm")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    right = [mean for mean, _ in found["what was sent"]]
    for what, values in found.items():
        means = [mean for mean, _ in values]
        print(
            f"{arguments.kind} with {what}: {len(means)} pushes in {arguments.dtype}, mean of 16 |differences| "
            f"{median(means):.2g} in the middle, {min(means):.2g} to {max(means):.2g}; a single token up to "
            f"{max(largest for _, largest in values):.2g} nats"
        )
    print(f"tolerance {TOLERANCE[arguments.dtype]:g}: {TOLERANCE[arguments.dtype] / max(right):.1f} x the largest mean")
    return int(max(right) > TOLERANCE[arguments.dtype])


if __name__ == "__main__":
    sys.exit(main())
