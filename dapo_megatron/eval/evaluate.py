"""Samples and grades held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dapo_megatron.config import HeldOut
from dapo_megatron.eval.statistics import accuracy, bootstrap_interval, majority, pass_at_k, powers, standard_error
from dapo_megatron.rollout.collect import Grader, sample_groups
from dapo_megatron.rollout.engine import Responder, Sampling, request_seed
from dapo_megatron.types import Decode, Group, Prompt

EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Example:
    """One graded response."""

    prompt: str
    answer: str
    """The gold answer."""
    response: str
    """Untrusted: model output."""
    extracted: str | None
    """What the grader read as the answer; None where it found none. Untrusted: model output."""
    correct: bool


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Accuracy on held-out prompts."""

    prompts: int
    samples: int
    """Responses per prompt."""
    accuracy: float
    """avg@samples: mean over samples and prompts."""
    standard_error: float
    """Standard error of the accuracy, over prompts. nan for a single one."""
    interval: tuple[float, float]
    """95% bootstrap interval of the accuracy, over prompts."""
    pass_at_k: Mapping[int, float]
    """k -> chance that one of k responses is right; k = 1, 2, 4, ..., samples."""
    majority_at_k: float
    """Share of prompts whose most frequent answer is right; k = samples."""
    mean_length: float
    """Tokens of a response, the end token included."""
    truncated: float
    """Share of responses that ran into the cap."""
    examples: tuple[Example, ...]
    """The first response to each of the first prompts: the same prompts every time."""


async def evaluate(
    engines: Responder,
    prompts: Sequence[Prompt],
    judge: Grader,
    decode: Decode,
    how: HeldOut,
    *,
    seed: int,
    max_tokens: int,
    stop_token_ids: tuple[int, ...],
) -> EvalResult:
    """Sample `how.samples` responses to every prompt and grade them.

    Every evaluation has the same seeds: what differs between two is the policy.

    Args:
        seed: that of the run's sampling.

    Raises:
        RolloutError: where the engine aborted a response.
        EngineError: when an engine fails.
    """
    sampling = Sampling(how.temperature, how.top_p, max_tokens, stop_token_ids)
    seeds = partial(request_seed, seed, "eval")
    return summarise(await sample_groups(engines, prompts, judge, sampling, how.samples, seeds), decode)


def summarise(groups: Sequence[Group], decode: Decode) -> EvalResult:
    """Return the result from graded groups of equal size. `decode` makes the texts of the examples."""
    correct_PK = [group.correct for group in groups]
    samples = len(correct_PK[0])
    completions = [completion for group in groups for completion in group.completions]
    return EvalResult(
        prompts=len(groups),
        samples=samples,
        accuracy=accuracy(correct_PK),
        standard_error=standard_error(correct_PK),
        interval=bootstrap_interval(correct_PK),
        pass_at_k={k: pass_at_k(correct_PK, k) for k in powers(samples)},
        majority_at_k=majority([group.extracted for group in groups], correct_PK),
        mean_length=float(np.mean([completion.length for completion in completions])),
        truncated=float(np.mean([completion.truncated for completion in completions])),
        examples=tuple(
            Example(
                group.prompt.text,
                group.prompt.answer,
                decode(group.completions[0].token_ids),
                group.extracted[0],
                group.correct[0],
            )
            for group in groups[:EXAMPLES]
        ),
    )
