"""Tokens per second of a training step beside Hugging Face and plain PyTorch, and memory of the log-prob pass.

    python -m benchmarks.train_step

A step is forward, backward, clipping and AdamW on one mini-batch of ragged sequences, in micro-batches of at most 4,096
slots. Responses have lognormal lengths with mean 150 and sigma 1 (median 91), cut at 1,000; prompts have 20 to 60
tokens. Counted are the sequences' own tokens, never padding. The sides:

- ours: `Actor.step` with `DapoLoss` on what `pack` makes.
- padded: Hugging Face's model on right-padded batches filled in the given order, padding counted in the budget.
- unpadded: the fastest of four ways around padding: batches sorted by length and filled to the budget; sorted batches
  with little padding; one sequence at a time; sequences packed end to end with position_ids, which transformers turns
  into a block mask. Here the output layer sees response tokens only, as it does with ours.

Hugging Face's sides run SDPA without a mask (causality hides padding at the end) and fused AdamW; in bfloat16 with
float32 master weights as ours, but gradients added up in bfloat16 (ours: float32). Batches are made before the clock
starts. The first step of every side must give the same loss and gradient norm. Then the sides take turns, and the
median round counts.

Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks import logprob_memory
from dapo_megatron.actor import topology
from dapo_megatron.actor.actor import Actor
from dapo_megatron.algo.objective import Objective
from dapo_megatron.config import Config, ParallelConfig
from dapo_megatron.config_file import parse
from dapo_megatron.pack import pack
from dapo_megatron.types import TrainSample
from dapo_megatron.weights.hf import HfCheckpoint

BUDGET = 4_096
RESPONSE_MEAN, RESPONSE_SIGMA, RESPONSE_CAP, PROMPT = 150, 1.0, 1_000, (20, 60)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AGREEMENT = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 5e-2)}
"""Of the sides: absolute in the loss, relative in the gradient norm."""
MIN_SPEEDUP = 1.5

Batches = Sequence[Sequence[TrainSample]]
Step = Callable[[], tuple[float, float]]
"""One optimizer step: its loss, and the gradient norm before clipping."""


@dataclass(frozen=True)
class Size:
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    sequences: int
    """In the mini-batch."""


SIZES = {
    "1M": Size(hidden=128, ffn=384, layers=4, heads=4, kv_heads=2, vocabulary=1_024, sequences=96),
    "15M": Size(hidden=384, ffn=1_152, layers=8, heads=6, kv_heads=2, vocabulary=4_096, sequences=32),
}


def save_model(folder: Path, size: Size) -> int:
    """A random checkpoint; its parameters."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.ffn,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            max_position_embeddings=2_048,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    return sum(param.numel() for param in model.parameters())


def rollout(size: Size, seed: int) -> list[TrainSample]:
    """Random tokens. What the engine is said to have sampled with stands for the old log-probs, too."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    mu = math.log(RESPONSE_MEAN) - RESPONSE_SIGMA**2 / 2
    samples = []
    for number in range(size.sequences):
        prompt = rng.randint(*PROMPT)
        length = prompt + min(RESPONSE_CAP, max(1, round(rng.lognormvariate(mu, RESPONSE_SIGMA))))
        samples.append(
            TrainSample(
                token_ids=torch.randint(size.vocabulary, (length,), generator=generator).int(),
                loss_mask=torch.arange(length) >= prompt,
                rollout_logprobs=0.2 * torch.randn(length, generator=generator) - math.log(size.vocabulary),
                advantage=rng.gauss(0, 1),
                group=number,
            )
        )
    return samples


def settings(folder: Path, dtype: str, size: Size) -> Config:
    return parse(
        {
            "model": {"path": str(folder), "dtype": dtype},
            "data": {"train": "none", "max_prompt_tokens": PROMPT[1]},
            "rollout": {
                "prompts": size.sequences // 2,
                "responses": 2,
                "max_response_tokens": RESPONSE_CAP,
                "temperature": 0.9,
            },
            "reward": {"overlong": {"punishment": False}},
            "train": {"mini_batch": size.sequences, "micro_batch_tokens": BUDGET},
        }
    )


def ours(config: Config, topo: topology.Topology, samples: Sequence[TrainSample]) -> Step:
    actor = Actor(config, topo, HfCheckpoint(config.model.path))
    loss = Objective(config.algo)
    packed = pack(samples, mini_batch=len(samples), micro_batch_tokens=BUDGET, replicas=1, seed=0)
    (mini_batch,) = packed.share(0).mini_batches()
    batches = tuple(replace(batch, old_logprobs_T=batch.rollout_logprobs_T) for batch in mini_batch.micro_batches)
    mini_batch = replace(mini_batch, micro_batches=batches)

    def step() -> tuple[float, float]:
        result = actor.update(mini_batch, loss, lr=config.optimizer.lr)
        return result["loss"], result["grad_norm"]

    return step


@dataclass(frozen=True)
class Rows:
    """A batch as Hugging Face wants it: B rows of W slots, slot by slot an input beside its label."""

    tokens_BW: Tensor
    labels_BW: Tensor
    loss_mask_BW: Tensor
    old_logprobs_BW: Tensor
    advantages_BW: Tensor
    positions_BW: Tensor | None
    """Only where sequences are packed into one row."""


def padded_rows(batch: Sequence[TrainSample]) -> Rows:
    def pad(rows: list[Tensor]) -> Tensor:
        return pad_sequence(rows, batch_first=True)

    return Rows(
        tokens_BW=pad([sample.token_ids[:-1] for sample in batch]).long(),
        labels_BW=pad([sample.token_ids[1:] for sample in batch]).long(),
        loss_mask_BW=pad([sample.loss_mask[1:] for sample in batch]),
        old_logprobs_BW=pad([sample.rollout_logprobs[1:] for sample in batch]),
        advantages_BW=pad([torch.full((sample.length - 1,), sample.advantage) for sample in batch]),
        positions_BW=None,
    )


def packed_rows(batch: Sequence[TrainSample]) -> Rows:
    singles = [padded_rows([sample]) for sample in batch]
    names = [name for name in Rows.__dataclass_fields__ if name != "positions_BW"]
    fields = {name: torch.cat([getattr(rows, name) for rows in singles], dim=1) for name in names}
    positions = torch.cat([torch.arange(sample.length - 1) for sample in batch])[None]
    return Rows(**fields, positions_BW=positions)


def fill(samples: Sequence[TrainSample], *, padded: bool = True, tolerance: float = math.inf) -> Batches:
    """Batches in order, as large as the budget allows; those of falling lengths end where `tolerance` is exceeded.

    Args:
        padded: sequences count as long as the longest of their batch.
        tolerance: the longest over the shortest of a batch, less 1, at the most.
    """
    batches: list[list[TrainSample]] = []
    for sample in samples:
        together = [*batches[-1], sample] if batches else [sample]
        slots = [other.length - 1 for other in together]
        cost = max(slots) * len(slots) if padded else sum(slots)
        if batches and cost <= BUDGET and max(slots) <= (1 + tolerance) * min(slots):
            batches[-1] = together
        else:
            batches.append([sample])
    return batches


def hugging_face(config: Config, batches: Sequence[Rows], *, all_logits: bool = False) -> Step:
    model: Any = Qwen2ForCausalLM.from_pretrained(
        config.model.path, dtype=DTYPES[config.model.dtype], attn_implementation="sdpa"
    )
    params = list(model.parameters())
    in_float32 = config.model.dtype == "float32"
    masters = params if in_float32 else [param.detach().float() for param in params]
    optimizer = torch.optim.AdamW(masters, lr=config.optimizer.lr, weight_decay=0.1, fused=True)
    loss_tokens = sum(int(rows.loss_mask_BW.sum()) for rows in batches)
    low, high = 1 - config.algo.settings.clip_low, 1 + config.algo.settings.clip_high

    def loss_of(rows: Rows) -> Tensor:
        mask_BW = rows.loss_mask_BW
        hidden = model.model(rows.tokens_BW, position_ids=rows.positions_BW, use_cache=False).last_hidden_state
        labels = rows.labels_BW
        if not all_logits:
            hidden, labels = hidden[mask_BW], labels[mask_BW]
        log_p = torch.log_softmax(model.lm_head(hidden).float() / config.rollout.temperature, -1)
        logprobs = log_p.gather(-1, labels[..., None]).squeeze(-1)
        if all_logits:
            logprobs = logprobs[mask_BW]
        ratio = (logprobs - rows.old_logprobs_BW[mask_BW]).exp()
        advantages = rows.advantages_BW[mask_BW]
        return -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages).sum() / loss_tokens

    def step() -> tuple[float, float]:
        total = 0.0
        for rows in batches:
            loss = loss_of(rows)
            loss.backward()
            total += loss.item()
        if not in_float32:
            for master, param in zip(masters, params, strict=True):
                master.grad = param.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(masters, config.optimizer.clip_grad)
        optimizer.step()
        if not in_float32:
            for master, param in zip(masters, params, strict=True):
                param.data.copy_(master)
        model.zero_grad()
        return total, norm.item()

    return step


def ways_around_padding(samples: Sequence[TrainSample]) -> dict[str, list[Rows]]:
    falling = sorted(samples, key=lambda sample: -sample.length)
    return {
        "sorted": [padded_rows(batch) for batch in fill(falling)],
        "sorted, padding under 1/8": [padded_rows(batch) for batch in fill(falling, tolerance=0.125)],
        "one by one": [padded_rows([sample]) for sample in samples],
        "block mask": [packed_rows(batch) for batch in fill(samples, padded=False)],
    }


def seconds(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def compare(name: str, dtype: str, folder: Path, topo: topology.Topology, rounds: int) -> bool:
    """Measure one model in one precision and print a line; whether the target is met."""
    size = SIZES[name]
    samples = rollout(size, seed=0)
    config = settings(folder, dtype, size)
    sides = {
        "ours": ours(config, topo, samples),
        "padded": hugging_face(config, [padded_rows(batch) for batch in fill(samples)], all_logits=True),
    }
    ways = {way: hugging_face(config, batches) for way, batches in ways_around_padding(samples).items()}
    wanted_loss, wanted_norm = sides["ours"]()
    in_loss, in_norm = AGREEMENT[dtype]
    for side, step in {"padded": sides["padded"], **ways}.items():
        loss, norm = step()
        assert abs(loss - wanted_loss) <= in_loss and math.isclose(norm, wanted_norm, rel_tol=in_norm), (
            f"{side}: loss {loss}, gradient norm {norm}; ours: {wanted_loss}, {wanted_norm}"
        )
    trial = {way: seconds(step) for way, step in ways.items()}
    fastest = min(trial, key=trial.__getitem__)
    sides["unpadded"] = ways[fastest]
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, step in sides.items():
            times[side].append(seconds(step))
    tokens = sum(sample.length - 1 for sample in samples)
    speed = {side: tokens / median(taken) for side, taken in times.items()}
    over_padded, over_unpadded = (speed["ours"] / speed[side] for side in ("padded", "unpadded"))
    shown = " | ".join([name, dtype, *(f"{speed[side]:,.0f}" for side in sides), fastest])
    print(f"| {shown} | {over_padded:.2f} | {over_unpadded:.2f} |", flush=True)
    return over_padded >= MIN_SPEEDUP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    topo = topology.initialize(ParallelConfig())
    met = True
    with tempfile.TemporaryDirectory() as folder:
        print(f"tokens per second, {arguments.threads} threads, median of {arguments.rounds} rounds in turn")
        print("| model | dtype | ours | padded | unpadded | which | ours / padded | ours / unpadded |")
        for name in arguments.sizes:
            path = Path(folder) / name
            save_model(path, SIZES[name])
            for dtype in arguments.dtypes:
                met &= compare(name, dtype, path, topo, arguments.rounds)
    print(f"target: ours / padded at least {MIN_SPEEDUP}\n")
    topology.shutdown()
    met &= logprob_memory.report(arguments.threads)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
