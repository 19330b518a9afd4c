"""Makes mini-batches that are hard to reduce right."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dapo_megatron.check_reduction.miniature import VOCAB
from dapo_megatron.check_reduction.reference import Case, importance, objective_of
from dapo_megatron.config import Config
from dapo_megatron.types import TrainSample

OLD = 0.3
"""Standard deviation of log policy - log old policy."""


def samples(
    seed: int, responses: Sequence[int], *, trained: float = 1.0, masked: Sequence[int] = ()
) -> list[TrainSample]:
    """Make responses of these lengths after prompts of 1 to 9 tokens, three to a group.

    Args:
        trained: the share of response tokens that keep their loss.
        masked: indices of responses without loss, as overlong filtering leaves them.
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
                token_ids=torch.randint(VOCAB, (length,), generator=generator).int(),
                loss_mask=loss_mask,
                rollout_logprobs=torch.zeros(length),
                advantage=float(torch.randn((), generator=generator)),
                group=index // 3,
            )
        )
    return made


def make_cases(config: Config, logprobs: Callable[[TrainSample], Tensor]) -> list[Case]:
    """Make all cases. `logprobs(sample)` gives float64 [L] of the initial policy, 0 at the start of the sequence."""
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


def _case(
    name: str, made: Sequence[TrainSample], config: Config, logprobs: Callable[[TrainSample], Tensor], budget: int
) -> Case:
    """Make old policy, reference and engine differ from the policy by random factors: clips and corrections take part.

    No ratio is near a kink of the objective: what rounding may push over it says nothing.
    """
    chance = random.Random(name)

    def drawn(length: int, spread: float) -> Tensor:
        return torch.tensor([chance.gauss(0.0, spread) for _ in range(length)], dtype=torch.float64)

    kept, old, ref = [], [], []
    for sample in made:
        policy = logprobs(sample)
        off_engine = drawn(sample.length, _engine_spread(config, sample))
        ref.append((policy + drawn(sample.length, 0.5)).float())
        # Which tokens a correction leaves in the loss does not depend on the old policy, only on how far it is off.
        beside = replace(sample, rollout_logprobs=off_engine)
        _, in_loss = importance(torch.zeros(sample.length), beside, config.algo.correction)
        old.append((policy - _shift(sample, in_loss, config, chance)).float())
        kept.append(replace(sample, rollout_logprobs=(old[-1] + off_engine).float() * sample.loss_mask))
    return Case(name, tuple(kept), tuple(old), tuple(ref), budget)


def _shift(sample: TrainSample, in_loss: Tensor, config: Config, chance: random.Random) -> Tensor:
    """Draw log policy - log old policy, float64 [L], away from the kinks of the loss.

    At a kink the gradient begins or ends: tokens are drawn again for which a little more or less changes that. One
    token in ten is sent beyond a bound of the loss, where it names any.
    """
    margin = 1e-2 if config.model.dtype == "float32" else 0.1
    bounds = config.algo.found_loss.bounds(config.algo.settings)
    shift = torch.zeros(sample.length, dtype=torch.float64)
    again = torch.ones(sample.length, dtype=torch.bool)
    while again.any():
        for index in again.nonzero()[:, 0].tolist():
            shift[index] = chance.gauss(0.0, OLD)
            if bounds and chance.random() < 0.1:
                shift[index] += math.log(chance.choice(bounds)) + 3 * margin
        again = torch.zeros_like(again)
        if in_loss.any():
            slopes = [_has_slope(shift[in_loss] + step, sample.advantage, config) for step in (0.0, margin, -margin)]
            again[in_loss] = (slopes[0] != slopes[1]) | (slopes[0] != slopes[2])
    return shift


def _has_slope(log_ratio: Tensor, advantage: float, config: Config) -> Tensor:
    """Return whether the objective has a gradient at each loss token of a response with these log-ratios: bool [n]."""
    with torch.enable_grad():
        policy = log_ratio.clone().requires_grad_()
        objective = objective_of(policy, torch.zeros_like(policy), advantage, config.algo)
        return torch.autograd.grad(objective.sum(), policy)[0] != 0


def _engine_spread(config: Config, sample: TrainSample) -> float:
    """Return the standard deviation of log trainer - log engine: the correction then changes some tokens, not all."""
    correction = config.algo.correction
    match correction.kind:
        case "none":
            return 0.02
        case "truncated":
            reach = max(abs(math.log(correction.cap)), 0.02)
        case "masked":
            reach = min(abs(math.log(end)) for end in correction.band if end != 1)
    return reach if correction.level == "token" else reach / math.sqrt(max(1, sample.loss_tokens))
