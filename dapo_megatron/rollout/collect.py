"""Fills a training batch with groups worth training on: dynamic sampling (paper, section 3.2 and Algorithm 1).

As in the published code, groups keep the order in which their prompts were drawn. Taking the first that finish would
favour prompts with short answers.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from dapo_megatron.config import RolloutConfig
from dapo_megatron.errors import RolloutError
from dapo_megatron.measures import Max, Mean, Measure, Measures, Sum
from dapo_megatron.rollout.engine import Responder, Sampling
from dapo_megatron.types import Completion, FinishReason, Group, Prompt

Grader = Callable[[Prompt, Sequence[Completion]], Awaitable[Group]]
"""Grades the responses to one prompt."""

Seeds = Callable[[int, str], int]
"""The seed for the responses to a prompt, from its place among those drawn, from 0, and its uid."""


@dataclass(frozen=True, slots=True)
class Rollout:
    groups: tuple[Group, ...]
    """What to train on."""
    carried: tuple[Group, ...]
    """What was worth training on beyond that, for the next step; empty unless rollout.surplus_groups is "carry"."""
    measures: Measures
    """What the rollout generated (`obs.metrics.METRICS` has the meanings)."""


async def collect(
    engines: Responder,
    take: Callable[[int], Sequence[Prompt]],
    judge: Grader,
    config: RolloutConfig,
    *,
    keep: Callable[[Sequence[bool]], bool],
    sampling: Sampling,
    seeds: Seeds,
    carried: Sequence[Group] = (),
) -> Rollout:
    """Sample and grade until there are `config.prompts` groups to keep.

    Without dynamic sampling: one batch of `config.prompts`, as it comes.

    Args:
        take: draws that many prompts.
        judge: grades the responses to one prompt, as soon as they are there.
        keep: whether a group is worth training on, from which of its responses are right.
        seeds: of this step. Places count on from one generation batch to the next.
        carried: groups left over from the step before; they are trained on first.

    Raises:
        RolloutError: when `config.max_generation_batches` do not hold enough of them (or, with
            too_few_groups="train", none at all), or the engine aborted a response.
        EngineError: when an engine fails.
    """
    started = time.monotonic()
    if not config.dynamic_sampling:
        groups = await sample_groups(engines, take(config.prompts), judge, sampling, config.responses, seeds)
        return Rollout(groups, (), _measures(groups, groups, engines.version, 1, 0, started))

    graded: list[Group] = []
    kept = list(carried)
    batches = 0
    while len(kept) < config.prompts and batches < config.max_generation_batches:
        drawn = take(config.draw)
        groups = await sample_groups(
            engines, drawn, judge, sampling, config.responses, seeds, first=batches * config.draw
        )
        batches += 1
        graded += groups
        kept += (group for group in groups if keep(group.correct))

    chosen, surplus = tuple(kept[: config.prompts]), tuple(kept[config.prompts :])
    carry = config.surplus_groups == "carry"
    measures = _measures(graded, chosen, engines.version, batches, 0 if carry else len(surplus), started)
    if len(chosen) < config.prompts and (not chosen or config.too_few_groups == "raise"):
        raise RolloutError(_shortage(len(chosen), len(carried), measures, config))
    return Rollout(chosen, surplus if carry else (), measures)


async def sample_groups(
    engines: Responder,
    prompts: Sequence[Prompt],
    judge: Grader,
    sampling: Sampling,
    responses: int,
    seeds: Seeds,
    *,
    first: int = 0,
) -> tuple[Group, ...]:
    """Return one graded group of `responses` per prompt, in the order of `prompts`, each graded as soon as it is there.

    A failure cancels what is still being generated.

    Args:
        first: the place of the first prompt, for `seeds`; the others follow.

    Raises:
        RolloutError: where the engine aborted a response.
        EngineError: when an engine fails.
    """

    async def answer(place: int, prompt: Prompt) -> Group:
        seeded = replace(sampling, seed=seeds(place, prompt.uid))
        completions = await engines.generate(prompt, seeded, responses)
        aborted = sum(completion.finish is FinishReason.ABORT for completion in completions)
        if aborted:
            raise RolloutError(f"the engine aborted {aborted} of {len(completions)} responses to prompt {prompt.uid}")
        return await judge(prompt, completions)

    tasks = [asyncio.ensure_future(answer(place, prompt)) for place, prompt in enumerate(prompts, first)]
    try:
        return tuple(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _measures(
    groups: Sequence[Group], chosen: Sequence[Group], version: int, batches: int, discarded: int, started: float
) -> dict[str, Measure]:
    completions = _completions(groups)
    lengths = [completion.length for completion in completions]
    rights = [right for group in groups for right in group.correct]
    rewards = [reward for group in groups for reward in group.rewards]
    ages = [version - min(span.version for span in completion.versions) for completion in _completions(chosen)]
    truncated = sum(completion.truncated for completion in completions)
    read = sum(len(group.prompt.token_ids) * len(group.completions) for group in groups)
    return {
        "accuracy": Mean(sum(rights), len(rights)),
        "reward": Mean(math.fsum(rewards), len(rewards)),
        "response_length": Mean(sum(lengths), len(lengths)),
        "response_length_max": Max(max((completion.length for completion in _completions(chosen)), default=math.nan)),
        "truncated": Mean(truncated, len(completions)),
        "truncated_right": Mean(sum(group.truncated_right for group in groups), truncated),
        "grading_timeouts": Sum(sum(group.timed_out for group in groups)),
        "staleness": Mean(sum(ages), len(ages)),
        "groups/kept": Sum(len(chosen)),
        "groups/all_right": Sum(sum(all(group.correct) for group in groups)),
        "groups/all_wrong": Sum(sum(not any(group.correct) for group in groups)),
        "groups/discarded": Sum(discarded),
        "generation_batches": Sum(batches),
        "tokens_per_second": Mean(sum(lengths), time.monotonic() - started),
        "engine/cached": Mean(sum(completion.cached_tokens for completion in completions), read),
    }


def _completions(groups: Sequence[Group]) -> list[Completion]:
    return [completion for group in groups for completion in group.completions]


def _shortage(found: int, carried: int, measures: Measures, config: RolloutConfig) -> str:
    batches, right, wrong = (
        round(measures[name].value) for name in ("generation_batches", "groups/all_right", "groups/all_wrong")
    )
    advice = (
        "most prompts are too hard for this model, or its answers are not recognised: look at rollouts.jsonl and "
        "reward.rule, or train on easier prompts"
        if wrong >= right
        else "most prompts are too easy for this model: train on harder ones"
    )
    remedies = "raise rollout.max_generation_batches or rollout.responses, or lower rollout.prompts"
    if found:
        remedies += ', or set rollout.too_few_groups="train" to go on with fewer'
    return (
        f"rollout: {found} groups to train on, {config.prompts} wanted (rollout.prompts). "
        f"{batches} generation batches x {config.draw} prompts = {batches * config.draw} groups of "
        f"{config.responses} responses: {found - carried} mixed{f' and {carried} carried over' if carried else ''}, "
        f"{right} all right, {wrong} all wrong. It seems that {advice}. Otherwise {remedies}"
    )
