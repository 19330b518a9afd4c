"""A real SGLang server on CPU, against the Hugging Face model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from dapo_megatron.config_file import parse
from dapo_megatron.errors import EngineError
from dapo_megatron.rollout.adapters.sglang import SglangEngine
from dapo_megatron.rollout.answer import GENERATE
from dapo_megatron.rollout.client import Client
from dapo_megatron.rollout.engine import KV_CACHE, WEIGHTS, Engine, Progress, Sampling
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.rollout.ports import reserve_port
from dapo_megatron.types import Completion, FinishReason, Prompt, VersionSpan
from tests.helpers.sglang import NOTICED_SECONDS, STARTUP_SECONDS, needs_sglang, the_model
from tests.helpers.tokens import assert_closed

pytestmark = [*needs_sglang, pytest.mark.timeout(STARTUP_SECONDS + 300)]

END = 2
PROMPTS = [Prompt(f"p{i}", tuple(3 + (13 * i + 7 * j) % 250 for j in range(5 + i)), "", "") for i in range(6)]


def sampling(**changes: Any) -> Sampling:
    return Sampling(**{"temperature": 1.0, "top_p": 1.0, "max_tokens": 64, "stop_token_ids": (END,)} | changes)


@pytest.fixture(scope="module")
def engines(tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    engine = {"kind": "sglang", "startup_seconds": STARTUP_SECONDS}
    folder = tmp_path_factory.mktemp("run")
    with closing(Engines(parse({**tiny_values, "engine": engine}), folder, ranks=0)) as engines:
        engines.wait_ready()
        yield engines


@pytest.fixture(scope="module")
def hf(tiny_model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()


def generate(
    engines: Engines, how: Sampling, n: int = 4, prompts: Sequence[Prompt] = PROMPTS, together: bool = True
) -> list[list[Completion]]:
    async def all_prompts() -> list[list[Completion]]:
        if together:
            return await asyncio.gather(*(engines.generate(prompt, how, n) for prompt in prompts))
        return [await engines.generate(prompt, how, n) for prompt in prompts]

    return engines.run(all_prompts())


def control(engine: Engine) -> Client:
    assert isinstance(engine, SglangEngine)
    return engine.control


@torch.no_grad()
def hf_logprobs(model: torch.nn.Module, prompt: Prompt, completion: Completion, temperature: float) -> torch.Tensor:
    tokens = torch.tensor([[*prompt.token_ids, *completion.token_ids.tolist()]])
    logits = model(tokens).logits[0, len(prompt.token_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.from_numpy(completion.token_ids).long()[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_at_the_temperature(engines: Engines, hf: torch.nn.Module, temperature: float) -> None:
    answers = generate(engines, sampling(temperature=temperature))
    errors = torch.cat(
        [
            (hf_logprobs(hf, prompt, completion, temperature) - torch.from_numpy(completion.logprobs)).abs()
            for prompt, completions in zip(PROMPTS, answers, strict=True)
            for completion in completions
        ]
    )
    assert len(errors) > 200
    assert errors.max() <= 2e-5


CONTROL = {
    *("/pause_generation", "/continue_generation", "/init_weights_update_group", "/begin_weight_update"),
    *("/update_weights_from_distributed", "/update_weights_from_disk", "/end_weight_update", "/flush_cache"),
    *("/release_memory_occupation", "/resume_memory_occupation"),
}
"""Paths by which weights are changed."""


def test_without_the_token_no_path_is_open_and_it_is_nowhere_to_be_seen(engines: Engines) -> None:
    (engine,) = engines
    assert isinstance(engine, SglangEngine)
    assert_closed(engines, engine.control, CONTROL)
    about = engines.run(engine.about())
    assert (about.kind, about.dtype, about.workers, about.sequence_tokens) == ("sglang", "float32", 1, 192)
    assert (about.model["model_type"], about.model["vocab_size"]) == ("qwen2", 264)
    assert "freeze_gc" not in engine.control.server.describe(), "SGLang's own question is let through"


def test_what_is_most_likely_is_what_the_model_says(engines: Engines, hf: torch.nn.Module) -> None:
    for prompt, (completion,) in zip(PROMPTS, generate(engines, sampling(temperature=0.0), n=1), strict=True):
        tokens = torch.tensor([[*prompt.token_ids, *completion.token_ids.tolist()]])
        logits = hf(tokens).logits[0, len(prompt.token_ids) - 1 : -1]
        assert completion.token_ids.tolist() == logits.argmax(-1).tolist()


def test_top_p_leaves_out_what_is_unlikely(engines: Engines, hf: torch.nn.Module) -> None:
    answers = generate(engines, sampling(top_p=0.2, seed=5, max_tokens=16))
    least = min(float(c.logprobs.min()) for completions in answers for c in completions)
    wide = generate(engines, sampling(seed=5, max_tokens=16))
    assert least > min(float(c.logprobs.min()) for completions in wide for c in completions) + 1


def test_end_token_is_kept_and_the_cap_holds(engines: Engines) -> None:
    ends = (END, *range(200, 223))
    completions = [c for group in generate(engines, sampling(max_tokens=8, stop_token_ids=ends), n=8) for c in group]
    assert {completion.finish for completion in completions} == {FinishReason.STOP, FinishReason.LENGTH}
    for completion in completions:
        assert not set(completion.token_ids[:-1].tolist()) & set(ends)
        if completion.finish is FinishReason.STOP:
            assert completion.token_ids[-1] in ends
        else:
            assert completion.length == 8
            assert completion.token_ids[-1] not in ends
        assert completion.versions == (VersionSpan(0, 0, completion.length),)


@pytest.mark.parametrize("ends", [(), (7,)])
def test_only_the_given_tokens_stop_a_response(engines: Engines, ends: tuple[int, ...]) -> None:
    """The checkpoint's config says that END does."""
    completions = [c for group in generate(engines, sampling(stop_token_ids=ends), n=12) for c in group]
    assert all(c.finish is FinishReason.LENGTH or c.token_ids[-1] == 7 for c in completions)
    assert any(END in c.token_ids[:-1] for c in completions)


def test_the_shortest_prompt_and_the_longest_sequence(engines: Engines) -> None:
    everything = tuple(range(264))
    (only,) = engines.run(engines.generate(Prompt("one", (5,), "", ""), sampling(stop_token_ids=everything), 1))
    assert (only.length, only.finish, only.logprobs.shape) == (1, FinishReason.STOP, (1,))
    longest = Prompt("longest", tuple([5] * 128), "", "")
    (whole,) = engines.run(engines.generate(longest, sampling(stop_token_ids=()), 1))
    assert (whole.length, whole.finish) == (64, FinishReason.LENGTH)


def test_on_cpu_nothing_is_cached(engines: Engines) -> None:
    """With seeds that are heeded, there is no prefix cache."""
    prompt = Prompt("again", tuple(3 + 11 * j % 250 for j in range(40)), "", "")
    asked = [engines.run(engines.generate(prompt, sampling(max_tokens=2), 1)) for _ in range(2)]
    assert [completion.cached_tokens for (completion,) in asked] == [0, 0]


def same(one: list[list[Completion]], other: list[list[Completion]]) -> bool:
    """Token by token, and log-probs bit by bit."""
    return [[(c.token_ids.tobytes(), c.logprobs.tobytes()) for c in group] for group in one] == [
        [(c.token_ids.tobytes(), c.logprobs.tobytes()) for c in group] for group in other
    ]


def test_a_seed_decides_on_the_responses_whatever_else_is_written(engines: Engines) -> None:
    how = sampling(seed=2**61 + 3, max_tokens=16)
    first = generate(engines, how)
    assert same(generate(engines, how), first)
    assert same(generate(engines, how, prompts=PROMPTS[::-1])[::-1], first)
    assert same(generate(engines, how, together=False), first)
    assert same(generate(engines, how, prompts=PROMPTS[:1], n=1), [first[0][:1]])
    more = generate(engines, how, n=7)
    assert same([group[:4] for group in more], first)
    assert all(len({c.token_ids.tobytes() for c in group}) == 7 for group in more)
    assert not same(generate(engines, sampling(seed=2**61 + 1000, max_tokens=16)), first)


def test_without_a_seed_every_response_is_another(engines: Engines) -> None:
    first, second = (generate(engines, sampling(max_tokens=16)) for _ in range(2))
    assert not same(first, second)
    assert all(len({c.token_ids.tobytes() for c in group}) == 4 for group in first)


def test_tokens_come_as_often_as_they_are_likely(engines: Engines, hf: torch.nn.Module) -> None:
    """With seeds, the noise is a hash of ours: 2,000 first tokens of one prompt against their probabilities."""
    prompt, n = PROMPTS[0], 2000
    (group,) = generate(engines, sampling(max_tokens=1, stop_token_ids=(), seed=11), n=n, prompts=[prompt])
    with torch.no_grad():
        expected = hf(torch.tensor([list(prompt.token_ids)])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([int(c.token_ids[0]) for c in group]), minlength=264) / n
    spread = (expected * (1 - expected) / n).sqrt()
    assert ((counts - expected).abs() <= 5 * spread + 1 / n).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"token_ids": []}, "empty"),
        (
            {"token_ids": [5] * 500},
            r"token_ids\(500\) \+ max_tokens\(4\) = 504 is more than the longest sequence\(192\)",
        ),
        ({"token_ids": [3, 264]}, "from 0 to 263"),
        ({"token_ids": [-1]}, "from 0 to 263"),
        ({"token_ids": "34"}, "TypeError"),
        ({"n": 0}, "n must be"),
        ({"n": None}, "n must be"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids"),
        ({"seed": "x"}, "TypeError"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(engines: Engines, changes: dict[str, Any], says: str) -> None:
    (engine,) = engines
    body = {"token_ids": [3, 4], "n": 1, **asdict(sampling(max_tokens=4))} | changes
    with pytest.raises(EngineError, match=rf"engine 0, .*: HTTP 400: [\s\S]*{says}[\s\S]*has not ended"):
        engines.run(control(engine).fetch("POST", GENERATE, body))
    with pytest.raises(EngineError, match="HTTP 400: KeyError"):
        engines.run(control(engine).fetch("POST", GENERATE, {}))
    assert len(engines.run(engines.generate(PROMPTS[0], sampling(max_tokens=1), 2))) == 2


def test_progress_is_that_of_what_is_being_written_and_ends_with_whoever_asked(engines: Engines) -> None:
    (engine,) = engines
    endless = sampling(stop_token_ids=())

    async def busy() -> bool:
        load = await control(engine).call("GET", "/v1/loads")
        return any(one["num_running_reqs"] + one["num_waiting_reqs"] for one in load["loads"])

    async def begin_and_leave() -> list[Progress]:
        looks = [await engine.progress()]
        tasks = [asyncio.create_task(engine.generate(prompt, endless, 8)) for prompt in PROMPTS]
        while looks[-1].tokens < 300:
            looks.append(await engine.progress())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(20):
            while (last := await engine.progress()) != looks[0]:
                await asyncio.sleep(0.02)
            while await busy():
                await asyncio.sleep(0.02)
        return [*looks, last]

    first, *looks, last = engines.run(begin_and_leave())
    assert first == last == Progress(0, 0)
    tokens = [look.tokens for look in looks]
    assert tokens == sorted(tokens) and tokens[-1] <= 64 * len(PROMPTS) * 8


def test_one_that_sleeps_answers_nothing_and_the_same_when_it_is_awake(engines: Engines) -> None:
    """Books only: on CPU nothing is freed, and the weights are still there."""
    (engine,) = engines
    how = sampling(temperature=0.0)

    async def sleep_and_wake() -> tuple[Completion, Completion]:
        (before,) = await engine.generate(PROMPTS[0], how, 1)
        await engine.sleep()
        assert await engine.progress() == Progress(0, 0)
        await engine.wake(WEIGHTS)
        asked = asyncio.create_task(engine.generate(PROMPTS[0], how, 1))
        await asyncio.sleep(0.3)
        assert not asked.done()
        await engine.wake(WEIGHTS, KV_CACHE)
        (after,) = await asked
        return before, after

    before, after = engines.run(sleep_and_wake())
    assert before.token_ids.tolist() == after.token_ids.tolist()


def test_responses_that_ended_before_the_others_are_counted(engines: Engines) -> None:
    (engine,) = engines

    async def looks() -> list[int]:
        task = asyncio.create_task(engine.generate(PROMPTS[0], sampling(stop_token_ids=tuple(range(0, 264, 8))), 100))
        finished = []
        while not task.done():
            finished.append((await engine.progress()).finished)
        assert len(await task) == 100
        return finished

    finished = engines.run(looks())
    assert 0 < max(finished) < 100
    assert finished[: finished.index(max(finished))] == sorted(finished[: finished.index(max(finished))])


def test_a_model_that_is_killed_is_noticed_and_nothing_is_left_behind(engines: Engines) -> None:
    """The server, which is another process, goes on answering until SGLang looks after the model's. Last, because it
    ends the engine of this module."""
    (guard,) = [p for p in psutil.Process().children() if "dapo_megatron.rollout.guard" in p.cmdline()]
    family = guard.children(recursive=True)
    assert len(family) >= 3
    listening = {c.laddr for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening and not [address for address in listening if address.ip != "127.0.0.1"]

    (model,) = the_model(family)
    (engine,) = engines

    async def killed_meanwhile() -> None:
        nonlocal killed
        endless = [engines.generate(prompt, sampling(stop_token_ids=()), 64) for prompt in PROMPTS]
        writing = asyncio.gather(*endless)
        while not (await engine.progress()).tokens:
            await asyncio.sleep(0.01)
        model.kill()
        killed = time.monotonic()
        await writing

    killed = 0.0
    with pytest.raises(EngineError, match="engine 0") as failure:
        engines.run(killed_meanwhile())
    assert 0 < time.monotonic() - killed < NOTICED_SECONDS
    assert "engine0.log" in str(failure.value)
    started = time.monotonic()
    engines.close()
    assert time.monotonic() - started < 8.0
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    for address in listening:
        reserve_port(*address).close()
