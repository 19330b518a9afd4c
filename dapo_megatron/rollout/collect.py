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
from dapo_megatron.rollout.engine import Responder, Sampling
from dapo_megatron.types import Completion, FinishReason, Group, Prompt

Grader = Callable[[Prompt, Sequence[Completion]], Awaitable[Group]]
"""Grades the responses to one prompt."""


@dataclass(frozen=True, slots=True)
class RolloutStats:
    """What one rollout step generated. Unless it says otherwise, a number is over every response graded in the step,
    kept or not. Means and shares of nothing are nan, for example where all groups were carried over.
    """

    generation_batches: int
    all_right: int
    """Groups without a wrong response."""
    all_wrong: int
    discarded: int
    """Groups worth training on, thrown away because there were more than needed."""
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
    """Versions between the oldest weights that wrote a response and those in use: mean over the responses to train on,
    carried ones included.
    """
    tokens: int
    """Generated."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Rollout:
    groups: tuple[Group, ...]
    """What to train on."""
    carried: tuple[Group, ...]
    """What was worth training on beyond that, for the next step; empty unless rollout.surplus_groups is "carry"."""
    stats: RolloutStats


async def collect(
    engines: Responder,
    take: Callable[[int], Sequence[Prompt]],
    judge: Grader,
    config: RolloutConfig,
    *,
    keep: Callable[[Sequence[bool]], bool],
    sampling: Sampling,
    carried: Sequence[Group] = (),
) -> Rollout:
    """Sample and grade until there are `config.prompts` groups to keep.

    Without dynamic sampling: one batch of `config.prompts`, as it comes.

    Args:
        take: draws that many prompts.
        judge: grades the responses to one prompt, as soon as they are there.
        keep: whether a group is worth training on, from which of its responses are right.
        carried: groups left over from the step before; they are trained on first.

    Raises:
        RolloutError: when `config.max_generation_batches` do not hold enough of them (or, with
            too_few_groups="train", none at all), or the engine aborted a response.
        EngineError: when an engine fails.
    """
    started = time.monotonic()
    if not config.dynamic_sampling:
        groups = await sample_groups(engines, take(config.prompts), judge, sampling, config.responses)
        return Rollout(groups, (), _stats(groups, groups, engines.version, 1, 0, started))

    graded: list[Group] = []
    kept = list(carried)
    batches = 0
    while len(kept) < config.prompts and batches < config.max_generation_batches:
        groups = await sample_groups(engines, take(config.draw), judge, sampling, config.responses)
        batches += 1
        graded += groups
        kept += (group for group in groups if keep(group.correct))

    chosen, surplus = tuple(kept[: config.prompts]), tuple(kept[config.prompts :])
    carry = config.surplus_groups == "carry"
    stats = _stats(graded, chosen, engines.version, batches, 0 if carry else len(surplus), started)
    if len(chosen) < config.prompts and (not chosen or config.too_few_groups == "raise"):
        raise RolloutError(_shortage(len(chosen), len(carried), stats, config))
    return Rollout(chosen, surplus if carry else (), stats)


async def sample_groups(
    engines: Responder, prompts: Sequence[Prompt], judge: Grader, sampling: Sampling, responses: int
) -> tuple[Group, ...]:
    """Return one graded group of `responses` per prompt, in the order of `prompts`, each graded as soon as it is there.

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
    batches: int,
    discarded: int,
    started: float,
) -> RolloutStats:
    completions = _completions(groups)
    truncated = sum(completion.truncated for completion in completions)
    return RolloutStats(
        generation_batches=batches,
        all_right=sum(all(group.correct) for group in groups),
        all_wrong=sum(not any(group.correct) for group in groups),
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


def _shortage(found: int, carried: int, stats: RolloutStats, config: RolloutConfig) -> str:
    batches = stats.generation_batches
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
        f"{batches} generation batches x {config.draw} prompts = {batches * config.draw} groups of "
        f"{config.responses} responses: {found - carried} mixed{f' and {carried} carried over' if carried else ''}, "
        f"{stats.all_right} all right, {stats.all_wrong} all wrong. It seems that {advice}. Otherwise {remedies}"
    )
