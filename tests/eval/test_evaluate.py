from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from dapo_megatron.config import HELD_OUT, DataConfig, EvalConfig
from dapo_megatron.errors import EngineError, RolloutError
from dapo_megatron.eval.evaluate import EvalResult, evaluate
from dapo_megatron.rollout.engine import Sampling, request_seed
from dapo_megatron.types import Completion, FinishReason, Group, Prompt
from tests.helpers.completions import read, written

PROMPTS = [Prompt(f"x:{number}", (number,), f"{number}+0=", str(number)) for number in range(1, 6)]


class Scripted:
    """Answers every prompt from a script of texts; "+" at the end is a truncated response, "!" an aborted one."""

    version = 0

    def __init__(self, *texts: str) -> None:
        self.texts = texts
        self.asked: list[tuple[str, Sampling, int]] = []

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
        self.asked.append((prompt.uid, sampling, n))
        await asyncio.sleep(0.001 * (10 - prompt.token_ids[0]))
        finish = {"+": FinishReason.LENGTH, "!": FinishReason.ABORT}
        return [written(text, finish.get(text[-1], FinishReason.STOP)) for text in self.texts[:n]]


async def judge(prompt: Prompt, completions: Sequence[Completion]) -> Group:
    texts = tuple(read(completion.token_ids) for completion in completions)
    correct = tuple(text == prompt.answer for text in texts)
    return Group(prompt, tuple(completions), texts, correct, tuple(map(float, correct)))


def measure(engine: Scripted, seed: int = 0, **settings: float) -> EvalResult:
    config = EvalConfig.model_validate({"data": "x", **settings})
    how = config.held_out(DataConfig(train="x"), "dapo")[HELD_OUT]
    return asyncio.run(evaluate(engine, PROMPTS, judge, read, how, seed=seed, max_tokens=8, stop_token_ids=(0,)))


def test_evaluate() -> None:
    engine = Scripted("1", "1", "2222+")
    result = measure(engine, samples=3, temperature=0.5, top_p=0.7)
    hows = [Sampling(0.5, 0.7, 8, (0,), request_seed(0, "eval", n, PROMPTS[n].uid)) for n in range(5)]
    assert engine.asked == [(prompt.uid, how, 3) for prompt, how in zip(PROMPTS, hows, strict=True)]
    assert (result.prompts, result.samples) == (5, 3)
    assert result.accuracy == pytest.approx(2 / 15)  # two of three responses to the first of five prompts
    assert result.pass_at_k == pytest.approx({1: 2 / 15, 2: 1 / 5, 3: 1 / 5})
    assert result.majority_at_k == pytest.approx(1 / 5)
    assert result.mean_length == pytest.approx((1 + 1 + 5) / 3)
    assert result.truncated == pytest.approx(1 / 3)
    low, high = result.interval
    assert low <= result.accuracy <= high


def test_every_evaluation_of_a_run_has_the_same_seeds() -> None:
    first, second, other = Scripted("1"), Scripted("1"), Scripted("1")
    for engine, seed in ((first, 3), (second, 3), (other, 4)):
        measure(engine, seed=seed)
    assert first.asked == second.asked
    seeds = [sampling.seed for _, sampling, _ in (*first.asked, *other.asked)]
    assert len(set(seeds)) == 10


def test_examples_are_the_first_prompts_whichever_is_done_first() -> None:
    examples = measure(Scripted("2", "3"), samples=2).examples
    assert [(example.prompt, example.answer, example.response, example.correct) for example in examples] == [
        ("1+0=", "1", "2", False),
        ("2+0=", "2", "2", True),
        ("3+0=", "3", "2", False),
    ]


def test_an_aborted_response_is_an_error() -> None:
    with pytest.raises(RolloutError, match="aborted 1 of 1 responses to prompt x:"):
        measure(Scripted("1!"))


def test_an_engine_that_fails_ends_the_evaluation_with_its_own_error() -> None:
    class Failing(Scripted):
        async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
            if prompt.uid == "x:3":
                raise EngineError("engine 0 died")
            await asyncio.sleep(60)
            return []

    with pytest.raises(EngineError, match="engine 0 died"):
        measure(Failing())
