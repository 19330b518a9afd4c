"""A small model with the settings of the user's, and mini-batches that are hard to reduce right."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dapo_megatron.check_reduction.layouts import Layout
from dapo_megatron.config import Config
from dapo_megatron.types import TrainSample

VOCAB = 211
"""No multiple of 16: Megatron pads it."""
HEAD = 16
OLD = 0.3
"""Standard deviation of log policy - log old policy."""
OPTIMIZER = {"lr": 1e-2, "eps": 1e-3}
"""Adam divides by the root of its second moment plus eps. With a small eps it blows rounding up to a whole step where
the gradient is about 0, and parameters say nothing about the gradient."""

MAX_DECAY = 1.0
"""With the miniature's rate, more could take all of a weight away."""


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """Samples of one update, and how they are split.

    >>> MiniBatch("one long", samples, old, ref, budget=64)  # doctest: +SKIP
    """

    name: str
    samples: tuple[TrainSample, ...]
    old: tuple[Tensor, ...]
    """float32 [L] of each sample, nats: log-probs of the old policy, away from the kinks of the clipped objective."""
    ref: tuple[Tensor, ...]
    """float32 [L] of each sample, nats: log-probs of the reference."""
    budget: int
    """Slots of a micro-batch."""


def hf_config(source: Any, layouts: Sequence[Layout], *, tied: bool) -> Any:
    """Makes `source` small: as many layers, heads and columns as the layouts need, all else as it is."""
    from transformers import AutoConfig

    tp = math.lcm(*(layout.parallel.tp for layout in layouts))
    stages = math.lcm(*(layout.parallel.pp * layout.parallel.vpp for layout in layouts))
    groups = max(tp, 2)
    heads = groups * min(4, max(1, source.num_attention_heads // source.num_key_value_heads))
    values = source.to_dict() | {
        "num_hidden_layers": max(stages, 2),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": HEAD,
        "hidden_size": heads * HEAD,
        "intermediate_size": 3 * heads * HEAD // 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "max_window_layers": max(stages, 2),
        "layer_types": None,
        "tie_word_embeddings": tied,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(values.pop("model_type"), **values)


def save_model(config: Any, folder: Path, dtype: torch.dtype) -> None:
    """Saves random weights that `dtype` holds exactly; biases and norms too, so that a forgotten one shows."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
    model.to(dtype).save_pretrained(folder)


def run_config(config: Config, layout: Layout, model: Path, dtype: str) -> Config:
    """The user's config with this model and layout."""
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": model, "dtype": dtype, "trust_remote_code": False}),
            "parallel": layout.parallel,
            "optimizer": config.optimizer.model_copy(
                update={**OPTIMIZER, "weight_decay": min(config.optimizer.weight_decay, MAX_DECAY)}
            ),
            # Larger passes for log-probs have a first ratio of 1 up to rounding only.
            "train": config.train.model_copy(update={"logprob_tokens": None}),
        }
    )


def samples(
    seed: int, responses: Sequence[int], *, trained: float = 1.0, masked: Sequence[int] = ()
) -> list[TrainSample]:
    """Responses of these lengths after prompts of 1 to 9 tokens, three to a group.

    Args:
        trained: share of response tokens that keep their loss.
        masked: responses without loss, as overlong filtering leaves them.
    """
    made = []
    generator = torch.Generator().manual_seed(seed)
    for index, response in enumerate(responses):
        prompt = int(torch.randint(1, 10, (), generator=generator))
        length = prompt + response
        loss_mask = torch.arange(length) >= prompt
        loss_mask &= (torch.rand(length, generator=generator) < trained) & (index not in masked)
        made.append(
            TrainSample(
                token_ids=torch.randint(VOCAB, (length,), generator=generator),
                loss_mask=loss_mask,
                rollout_logprobs=torch.zeros(length),
                advantage=float(torch.randn((), generator=generator)),
                group=index // 3,
                policy_version=0,
            )
        )
    return made


def mini_batches(config: Config, logprobs: Any) -> list[MiniBatch]:
    """The cases. `logprobs(sample)` gives float64 [L] of the initial policy, 0 at the start of the sequence."""
    lengths = (3, 60, 8, 21, 1, 34, 13, 5, 48, 27, 2, 11)
    cases = [
        ("one micro-batch", samples(1, lengths), 1024),
        ("many micro-batches", samples(2, lengths), 80),
        ("masked responses", samples(3, lengths, trained=0.6, masked=(1, 4, 8)), 80),
        ("uneven counts", samples(4, [64, 1, 1, 2, 1, 1]), 80),
        ("an empty rank", samples(5, [17]), 80),
        ("one token", samples(6, [1, 9, 30], masked=(1, 2)), 80),
    ]
    return [_case(name, made, config, logprobs, budget) for name, made, budget in cases]


def _case(name: str, made: Sequence[TrainSample], config: Config, logprobs: Any, budget: int) -> MiniBatch:
    """Old policy, reference and engine differ from the policy by random factors: clipping and corrections take part.

    What rounding may push over a kink of the objective says nothing: no ratio is near one.
    """
    kinks = [math.log1p(config.algo.clip_high), math.log1p(-config.algo.clip_low)]
    if config.algo.dual_clip is not None:
        kinks.append(math.log(config.algo.dual_clip))
    margin = 1e-2 if config.model.dtype == "float32" else 0.1
    chance = random.Random(name)

    def shift(length: int, spread: float) -> Tensor:
        drawn = []
        while len(drawn) < length:
            value = chance.gauss(0.0, spread)
            if config.algo.dual_clip is not None and spread == OLD and chance.random() < 0.1:
                value += math.log(config.algo.dual_clip) + 3 * margin
            if all(abs(value - kink) > margin for kink in kinks):
                drawn.append(value)
        return torch.tensor(drawn, dtype=torch.float64)

    kept, old, ref = [], [], []
    for sample in made:
        policy = logprobs(sample)
        # policy / old = exp(shift), so that the shift must stay away from the kinks.
        old.append((policy - shift(sample.length, OLD)).float())
        ref.append((policy + shift(sample.length, 0.5)).float())
        engine = (old[-1].double() + shift(sample.length, _engine_spread(config, sample))).float()
        kept.append(replace(sample, rollout_logprobs=engine * sample.loss_mask))
    return MiniBatch(name, tuple(kept), tuple(old), tuple(ref), budget)


def _engine_spread(config: Config, sample: TrainSample) -> float:
    """Standard deviation of log trainer - log engine of a token, such that the correction changes some and not all."""
    correction = config.algo.correction
    match correction.kind:
        case "none":
            return 0.02
        case "truncated":
            reach = max(abs(math.log(correction.cap)), 0.02)
        case "masked":
            reach = min(abs(math.log(end)) for end in correction.band if end != 1)
    return reach if correction.level == "token" else reach / math.sqrt(max(1, sample.loss_tokens))
