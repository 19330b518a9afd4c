"""Fills a training batch with groups worth training on: dynamic sampling (paper, section 3.2 and Algorithm 1).

As in the published code, groups keep the order in which their prompts were drawn. Taking the first that finish would
favour prompts with short answers.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from dapo_megatron.config import RolloutConfig
from dapo_megatron.errors import RolloutError
from dapo_megatron.rollout.engine import Sampler, Sampling
from dapo_megatron.types import Completion, FinishReason, Group, Prompt

Judge = Callable[[Prompt, Sequence[Completion]], Awaitable[Group]]


@dataclass(frozen=True, slots=True)
class RolloutStats:
    """What one rollout step generated. Unless it says otherwise, a number is over every response graded in the step,
    kept or not. Means and shares of nothing are nan, for example where all groups were carried over.

    >>> RolloutStats(generation_batches=1, prompts=1536, all_right=310, all_wrong=458, mixed=768, discarded=256,
    ...     accuracy=0.41, reward=-0.2, length=713.5, truncated=0.02, truncated_right=0.1, timed_out=3, staleness=0.0,
    ...     tokens=17_534_976, seconds=61.2)  # doctest: +SKIP
    """

    generation_batches: int
    prompts: int
    """Drawn, and answered with one group each."""
    all_right: int
    """Groups without a wrong response."""
    all_wrong: int
    mixed: int
    discarded: int
    """Mixed groups thrown away because there were more than needed."""
    accuracy: float
    reward: float
    length: float
    """Tokens of a response, the end token included."""
    truncated: float
    """Share of responses that ran into the cap."""
    truncated_right: float
    """Share of those whose answer is right, also where reward.truncated_is_wrong makes nothing of it."""
    timed_out: int
    """Responses whose grading ran out of time."""
    staleness: float
    """Weight updates between the oldest weights that wrote a response and those in use: mean over the responses to
    train on, carried ones included."""
    tokens: int
    """Generated."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Rollout:
    groups: tuple[Group, ...]
    """What to train on."""
    carried: tuple[Group, ...]
    """Mixed groups beyond that, for the next step; empty unless rollout.surplus_groups is "carry"."""
    stats: RolloutStats


async def collect(
    engines: Sampler,
    take: Callable[[int], Sequence[Prompt]],
    judge: Judge,
    config: RolloutConfig,
    *,
    is_mixed: Callable[[Sequence[bool]], bool],
    sampling: Sampling,
    carried: Sequence[Group] = (),
) -> Rollout:
    """Sample and grade until there are `config.prompts` mixed groups.

    Without dynamic sampling: one batch of `config.prompts`, as it comes.

    Args:
        take: draws that many prompts.
        is_mixed: looks at which of a group's responses are right.
        judge: grades the responses to one prompt, as soon as they are there.
        carried: mixed groups left over from the step before; they are trained on first.

    Raises:
        RolloutError: when `config.max_generation_batches` do not hold enough of them (or, with
            too_few_groups="train", none at all), or the engine aborted a response.
        EngineError: when an engine fails.
    """
    started = time.monotonic()
    if not config.dynamic_sampling:
        groups = await sample_groups(engines, take(config.prompts), judge, sampling, config.responses)
        return Rollout(groups, (), _stats(groups, groups, engines.version, is_mixed, 1, 0, started))

    graded: list[Group] = []
    kept = list(carried)
    batches = 0
    while len(kept) < config.prompts and batches < config.max_generation_batches:
        groups = await sample_groups(engines, take(config.draw), judge, sampling, config.responses)
        batches += 1
        graded += groups
        kept += (group for group in groups if is_mixed(group.correct))

    chosen, surplus = tuple(kept[: config.prompts]), tuple(kept[config.prompts :])
    carry = config.surplus_groups == "carry"
    stats = _stats(graded, chosen, engines.version, is_mixed, batches, 0 if carry else len(surplus), started)
    if len(chosen) < config.prompts and (not chosen or config.too_few_groups == "raise"):
        raise RolloutError(_shortage(len(chosen), stats, config))
    return Rollout(chosen, surplus if carry else (), stats)


async def sample_groups(
    engines: Sampler, prompts: Sequence[Prompt], judge: Judge, sampling: Sampling, responses: int
) -> tuple[Group, ...]:
    """One graded group of `responses` per prompt, in the order of `prompts`, each graded as soon as it is there.

    A failure cancels what is still being generated.

    Raises:
        RolloutError: where the engine aborted a response.
        EngineError: when an engine fails.
    """

    async def answer(prompt: Prompt) -> Group:
        completions = await engines.generate(prompt, sampling, responses)
        aborted = sum(completion.finish is FinishReason.ABORT for completion in completions)
        if aborted:
            raise RolloutError(f"the engine aborted {aborted} of {len(completions)} responses to prompt {prompt.uid}")
        return await judge(prompt, completions)

    tasks = [asyncio.ensure_future(answer(prompt)) for prompt in prompts]
    try:
        return tuple(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _stats(
    groups: Sequence[Group],
    chosen: Sequence[Group],
    version: int,
    is_mixed: Callable[[Sequence[bool]], bool],
    batches: int,
    discarded: int,
    started: float,
) -> RolloutStats:
    completions = _completions(groups)
    truncated = sum(completion.truncated for completion in completions)
    return RolloutStats(
        generation_batches=batches,
        prompts=len(groups),
        all_right=sum(all(group.correct) for group in groups),
        all_wrong=sum(not any(group.correct) for group in groups),
        mixed=sum(is_mixed(group.correct) for group in groups),
        discarded=discarded,
        accuracy=_mean([float(right) for group in groups for right in group.correct]),
        reward=_mean([reward for group in groups for reward in group.rewards]),
        length=_mean([float(completion.length) for completion in completions]),
        truncated=truncated / len(completions) if completions else math.nan,
        truncated_right=sum(group.truncated_right for group in groups) / truncated if truncated else math.nan,
        timed_out=sum(group.timed_out for group in groups),
        staleness=_mean([float(version - _oldest(completion)) for completion in _completions(chosen)]),
        tokens=sum(completion.length for completion in completions),
        seconds=time.monotonic() - started,
    )


def _completions(groups: Sequence[Group]) -> list[Completion]:
    return [completion for group in groups for completion in group.completions]


def _oldest(completion: Completion) -> int:
    return min(span.version for span in completion.versions)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _shortage(found: int, stats: RolloutStats, config: RolloutConfig) -> str:
    carried = f" and {found - stats.mixed} carried over" if found > stats.mixed else ""
    advice = (
        "most prompts are too hard for this model, or its answers are not recognised: look at rollouts.jsonl and "
        "reward.rule, or train on easier prompts"
        if stats.all_wrong >= stats.all_right
        else "most prompts are too easy for this model: train on harder ones"
    )
    remedies = "raise rollout.max_generation_batches or rollout.responses, or lower rollout.prompts"
    if found:
        remedies += ', or set rollout.too_few_groups="train" to go on with fewer'
    return (
        f"rollout: {found} groups to train on, {config.prompts} wanted (rollout.prompts). "
        f"{stats.generation_batches} generation batches x {config.draw} prompts = {stats.prompts} groups of "
        f"{config.responses} responses: {stats.mixed} mixed{carried}, {stats.all_right} all right, "
        f"{stats.all_wrong} all wrong. It seems that {advice}. Otherwise {remedies}"
    )
