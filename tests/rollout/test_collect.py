"""Dynamic sampling, with an engine that knows which prompts are easy."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dapo_megatron.algo.filter import is_mixed
from dapo_megatron.config import RolloutConfig
from dapo_megatron.errors import RolloutError
from dapo_megatron.measures import Mean
from dapo_megatron.rollout.collect import Grader, Rollout, Seeds, collect
from dapo_megatron.rollout.engine import Sampling, request_seed
from dapo_megatron.types import Completion, FinishReason, Group, Prompt, VersionSpan
from tests.helpers.completions import completion

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "fill.json").read_text())
RESPONSES = 4
SEEDS = partial(request_seed, 0, 0)


class Prompts:
    """Numbered prompts; `kinds` says over and over whether the next is mixed, right or wrong."""

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds, self.drawn = kinds, 0

    def take(self, count: int) -> list[Prompt]:
        numbers = range(self.drawn, self.drawn + count)
        self.drawn += count
        return [Prompt(str(number), (1,), self.kinds[number % len(self.kinds)], "") for number in numbers]


class Engine:
    """Answers later prompts sooner, so that order of arrival differs from order of generation."""

    def __init__(self, finish: FinishReason = FinishReason.STOP, version: int = 0) -> None:
        self.finish, self.version, self.asked = finish, version, 0

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
        self.asked += 1
        for _ in range(20 - int(prompt.uid) % 20):
            await asyncio.sleep(0)
        span = VersionSpan(self.version, 0, 2)
        return [completion((5, 2), (-0.1, -0.2), self.finish, [span]) for _ in range(n)]


async def judge(prompt: Prompt, completions: Sequence[Completion]) -> Group:
    right = {"right": len(completions), "wrong": 0, "mixed": 1}[prompt.text]
    correct = tuple(index < right for index in range(len(completions)))
    return Group(
        prompt, tuple(completions), (None,) * len(correct), correct, tuple(1.0 if c else -1.0 for c in correct)
    )


def roll(
    source: Prompts,
    carried: Sequence[Group] = (),
    engine: Engine | None = None,
    judge: Grader = judge,
    seeds: Seeds = SEEDS,
    **config: Any,
) -> Rollout:
    values = {"prompts": 4, "responses": RESPONSES} | config
    if values.get("dynamic_sampling", True):
        values = {"generation_batch": 6} | values
    settings = RolloutConfig.model_validate(values)
    sampling = Sampling.from_config(settings, (2,))
    work = collect(
        engine or Engine(),
        source.take,
        judge,
        settings,
        keep=is_mixed,
        sampling=sampling,
        seeds=seeds,
        carried=carried,
    )
    return asyncio.run(work)


def uids(groups: Sequence[Group]) -> list[int]:
    return [int(group.prompt.uid) for group in groups]


@pytest.mark.parametrize("case", GOLDEN["filled"])
def test_filling_a_published_batch(case: dict[str, Any]) -> None:
    mixed = round(case["rate"] * GOLDEN["generation_batch"])
    prompts = Prompts(["mixed"] * mixed + ["wrong"] * (GOLDEN["generation_batch"] - mixed))
    rollout = roll(prompts, prompts=GOLDEN["prompts"], generation_batch=GOLDEN["generation_batch"], responses=2)
    assert len(rollout.groups) == GOLDEN["prompts"]
    assert rollout.measures["generation_batches"].value == case["generation_batches"]
    assert len(rollout.groups) + rollout.measures["groups/discarded"].value == case["kept"]
    assert rollout.measures["groups/discarded"].value == case["dropped"]
    assert prompts.drawn == case["generation_batches"] * GOLDEN["generation_batch"]


def test_giving_up_says_what_was_found() -> None:
    batch, rate = GOLDEN["generation_batch"], GOLDEN["given_up"]["rate"]
    mixed = round(rate * batch)
    prompts = Prompts(["mixed"] * mixed + ["right"] * 100 + ["wrong"] * (batch - mixed - 100))
    with pytest.raises(RolloutError) as failure:
        roll(prompts, prompts=GOLDEN["prompts"], generation_batch=batch, responses=2)
    message = str(failure.value)
    assert f"{GOLDEN['given_up']['kept']} groups to train on, {GOLDEN['prompts']} wanted" in message
    assert f"10 generation batches x {batch} prompts = {10 * batch} groups" in message
    assert f"1000 all right, {10 * (batch - mixed - 100)} all wrong" in message
    assert "too hard" in message
    assert prompts.drawn == 10 * batch


def test_groups_keep_the_order_of_generation() -> None:
    rollout = roll(Prompts(["mixed", "wrong", "mixed", "right", "mixed", "mixed", "mixed"]))
    assert uids(rollout.groups) == [0, 2, 4, 5]


class Seeded(Engine):
    """Answers with what it was asked, in an order that `hurry` decides."""

    def __init__(self, hurry: int) -> None:
        super().__init__()
        self.hurry = hurry
        self.seeds: dict[str, int] = {}

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
        for _ in range(hash((self.hurry, prompt.uid)) % 20):
            await asyncio.sleep(0)
        assert sampling.seed is not None
        self.seeds[prompt.uid] = sampling.seed
        digits = [int(digit) for digit in str(sampling.seed)]
        return [completion((index, *digits)) for index in range(n)]


@pytest.mark.parametrize("dynamic", [True, False])
def test_responses_are_those_of_step_place_and_prompt_whoever_answers_first(dynamic: bool) -> None:
    def rolls(hurry: int) -> list[dict[str, int]]:
        prompts, carried, seeds = Prompts(["mixed", "wrong"]), (), []
        for step in range(3):
            engine = Seeded(hurry)
            filling: dict[str, Any] = {"surplus_groups": "carry"} if dynamic else {"dynamic_sampling": False}
            rollout = roll(prompts, carried, engine, seeds=partial(request_seed, 0, step), **filling)
            for group in rollout.groups:
                want = engine.seeds.get(group.prompt.uid)
                assert want is None or group.completions[0].token_ids.tolist() == [0, *map(int, str(want))]
            carried = rollout.carried
            seeds.append(engine.seeds)
        return seeds

    first = rolls(1)
    assert rolls(2) == first and rolls(3) == first
    # Dynamic: two batches of six bring six groups of four wanted, and two are carried. Places count on.
    drawn = [12, 6, 6] if dynamic else [4, 4, 4]
    assert [len(step) for step in first] == drawn
    uids = iter(range(sum(drawn)))
    for step, seeds in enumerate(first):
        wanted = [(place, str(next(uids))) for place in range(len(seeds))]
        assert seeds == {uid: request_seed(0, step, place, uid) for place, uid in wanted}


def test_a_prompt_that_is_drawn_twice_in_a_step_has_two_seeds() -> None:
    seeds: list[int | None] = []

    class Listening(Engine):
        async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
            seeds.append(sampling.seed)
            return await super().generate(prompt, sampling, n)

    class Two(Prompts):
        def take(self, count: int) -> list[Prompt]:
            return [replace(prompt, uid=str(int(prompt.uid) % 2)) for prompt in super().take(count)]

    roll(Two(["mixed", "wrong"]), engine=Listening())
    assert len(seeds) == len(set(seeds)) == 12


def test_surplus_is_discarded() -> None:
    rollout = roll(Prompts(["mixed"]))
    assert uids(rollout.groups) == [0, 1, 2, 3]
    assert rollout.carried == ()
    assert rollout.measures["groups/discarded"].value == 2


def test_surplus_is_carried_and_used_first() -> None:
    prompts = Prompts(["mixed"])
    first = roll(prompts, surplus_groups="carry")
    assert uids(first.carried) == [4, 5]
    assert first.measures["groups/discarded"].value == 0
    second = roll(prompts, carried=first.carried, surplus_groups="carry")
    assert uids(second.groups) == [4, 5, 6, 7]
    assert uids(second.carried) == [8, 9, 10, 11]
    engine = Engine()
    third = roll(prompts, carried=second.carried, engine=engine, surplus_groups="carry")
    assert uids(third.groups) == [8, 9, 10, 11]
    assert (engine.asked, third.measures["generation_batches"].value, third.measures["tokens_per_second"].value) == (
        0,
        0,
        0,
    )
    assert math.isnan(third.measures["accuracy"].value)


def test_too_few_groups_can_be_trained_on() -> None:
    prompts = Prompts(["mixed", *["right"] * 11])
    rollout = roll(prompts, too_few_groups="train", max_generation_batches=3)
    assert uids(rollout.groups) == [0, 12]
    with pytest.raises(RolloutError, match=r"2 groups to train on, 4 wanted.*too easy"):
        roll(Prompts(prompts.kinds), max_generation_batches=3)


def test_giving_up_counts_what_was_carried_over() -> None:
    carried = roll(Prompts(["mixed"]), surplus_groups="carry").carried
    with pytest.raises(
        RolloutError, match=r"3 groups to train on.*12 groups of 4 responses: 1 mixed and 2 carried over"
    ):
        roll(Prompts(["mixed", *["right"] * 11]), carried=carried, max_generation_batches=2)


def test_no_group_at_all_is_always_an_error() -> None:
    with pytest.raises(RolloutError, match="0 groups to train on"):
        roll(Prompts(["wrong"]), too_few_groups="train", max_generation_batches=2)


def test_without_dynamic_sampling_one_batch_is_taken_as_it_is() -> None:
    prompts = Prompts(["right", "mixed", "wrong"])
    rollout = roll(prompts, dynamic_sampling=False)
    assert uids(rollout.groups) == [0, 1, 2, 3]
    assert prompts.drawn == 4
    assert (rollout.measures["groups/all_right"].value, rollout.measures["groups/all_wrong"].value) == (2, 1)


def test_means_are_over_every_graded_response() -> None:
    stats = roll(Prompts(["mixed", "right", "wrong"]), max_generation_batches=2, generation_batch=6).measures
    # Twelve groups of four: four with 1, four with 4 and four with 0 right responses.
    assert (stats["generation_batches"].value, stats["groups/all_right"].value, stats["groups/all_wrong"].value) == (
        2,
        4,
        4,
    )
    assert stats["accuracy"].value == pytest.approx(20 / 48)
    assert stats["reward"].value == pytest.approx((20 - 28) / 48)
    assert (stats["response_length"].value, stats["truncated"].value) == (2.0, 0.0)
    tokens = stats["tokens_per_second"]
    assert isinstance(tokens, Mean) and tokens.total == 96


def test_prompts_that_engines_had_are_counted() -> None:
    class Remembering(Engine):
        async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
            first, *others = await super().generate(prompt, sampling, n)
            return [first, *(replace(written, cached_tokens=len(prompt.token_ids)) for written in others)]

    assert roll(Prompts(["mixed"]), engine=Remembering()).measures["engine/cached"].value == 0.75


def test_truncated_responses_are_counted() -> None:
    assert roll(Prompts(["mixed"]), engine=Engine(FinishReason.LENGTH)).measures["truncated"].value == 1.0


def test_what_the_judge_counted_is_added_up() -> None:
    class HalfTruncated(Engine):
        async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
            finish = FinishReason.LENGTH if int(prompt.uid) % 2 else FinishReason.STOP
            return [replace(written, finish=finish) for written in await super().generate(prompt, sampling, n)]

    async def counting(prompt: Prompt, completions: Sequence[Completion]) -> Group:
        group = await judge(prompt, completions)
        return replace(group, timed_out=2, truncated_right=sum(completion.truncated for completion in completions) // 4)

    # Six groups of four, of which three are truncated, one response of each group with a right answer.
    stats = roll(Prompts(["mixed"]), engine=HalfTruncated(), judge=counting).measures
    assert (stats["truncated"].value, stats["truncated_right"].value, stats["grading_timeouts"].value) == (
        0.5,
        3 / 12,
        12,
    )
    assert math.isnan(roll(Prompts(["mixed"])).measures["truncated_right"].value)


def test_staleness_is_that_of_the_oldest_weights_of_what_is_trained_on() -> None:
    prompts = Prompts(["mixed"])
    first = roll(prompts, engine=Engine(version=3), surplus_groups="carry")
    assert first.measures["staleness"].value == 0.0
    # Two groups carried over from version 3, of which one response has an end written by version 4; two new ones.
    mended, untouched = first.carried
    spans = (VersionSpan(3, 0, 1), VersionSpan(4, 1, 2))
    late = replace(mended.completions[0], versions=(VersionSpan(4, 0, 2),))
    mixed = replace(mended.completions[1], versions=spans)
    mended = replace(mended, completions=(late, mixed, *mended.completions[2:]))
    second = roll(prompts, carried=(mended, untouched), engine=Engine(version=5), surplus_groups="carry")
    assert second.measures["staleness"].value == pytest.approx((1 + 7 * 2 + 8 * 0) / 16)


def test_an_aborted_response_ends_the_rollout() -> None:
    with pytest.raises(RolloutError, match="aborted 4 of 4 responses to prompt"):
        roll(Prompts(["mixed"]), engine=Engine(FinishReason.ABORT))


def test_grading_does_not_wait_for_the_slowest_prompt() -> None:
    graded: list[str] = []
    all_but_one = asyncio.Event()

    class OneIsSlow(Engine):
        async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
            if prompt.uid == "0":
                await all_but_one.wait()
            return await super().generate(prompt, sampling, n)

    async def judge_and_tell(prompt: Prompt, completions: Sequence[Completion]) -> Group:
        graded.append(prompt.uid)
        if len(graded) == 3:
            all_but_one.set()
        return await judge(prompt, completions)

    config = RolloutConfig(prompts=4, responses=2)
    work = collect(
        OneIsSlow(),
        Prompts(["mixed"]).take,
        judge_and_tell,
        config,
        keep=is_mixed,
        sampling=Sampling.from_config(config, (2,)),
        seeds=SEEDS,
    )
    assert uids(asyncio.run(asyncio.wait_for(work, 5)).groups) == [0, 1, 2, 3]
    assert graded[-1] == "0"


def test_a_failure_cancels_the_other_requests() -> None:
    cancelled: list[str] = []

    class OneFails(Engine):
        async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
            if prompt.uid == "2":
                raise ValueError("no")
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(prompt.uid)
                raise
            return []

    with pytest.raises(ValueError, match="no"):
        roll(Prompts(["mixed"]), engine=OneFails())
    assert sorted(cancelled) == ["0", "1", "3", "4", "5"]
