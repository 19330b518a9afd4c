"""A real vLLM server on CPU, against the Hugging Face model in float32."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dapo_megatron.config_file import parse
from dapo_megatron.errors import ConfigError, EngineError
from dapo_megatron.rollout.engine import Sampling
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.rollout.ports import reserve_port
from dapo_megatron.types import Completion, FinishReason, Prompt, VersionSpan

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

END = 2
PROMPTS = [Prompt(f"p{i}", tuple(3 + (13 * i + 7 * j) % 250 for j in range(5 + i)), "", "") for i in range(6)]


def sampling(**changes: Any) -> Sampling:
    return Sampling(**{"temperature": 1.0, "top_p": 1.0, "max_tokens": 64, "stop_token_ids": (END,)} | changes)


@pytest.fixture(scope="module")
def engines(
    tiny_model: Path, tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engines]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    folder = tmp_path_factory.mktemp("run")

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    with closing(Engines(parse(tiny_values), folder, decode, ranks=0)) as engines:
        engines.wait_ready()
        yield engines


@pytest.fixture(scope="module")
def hf(tiny_model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def generate(engines: Engines, how: Sampling, n: int = 4) -> list[list[Completion]]:
    async def all_prompts() -> list[list[Completion]]:
        return await asyncio.gather(*(engines.generate(prompt, how, n) for prompt in PROMPTS))

    return engines.run(all_prompts())


@torch.no_grad()
def hf_logprobs(model: torch.nn.Module, prompt: Prompt, completion: Completion, temperature: float) -> torch.Tensor:
    tokens = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
    logits = model(tokens).logits[0, len(prompt.token_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_sampling_distribution(
    engines: Engines, hf: torch.nn.Module, temperature: float
) -> None:
    answers = generate(engines, sampling(temperature=temperature))
    errors = torch.cat(
        [
            (hf_logprobs(hf, prompt, completion, temperature) - torch.tensor(completion.logprobs)).abs()
            for prompt, completions in zip(PROMPTS, answers, strict=True)
            for completion in completions
        ]
    )
    assert len(errors) > 200
    assert errors.max() <= 2e-5


def test_every_prompt_gets_n_different_responses(engines: Engines) -> None:
    for completions in generate(engines, sampling(), n=7):
        assert len(completions) == 7
        assert len({completion.token_ids for completion in completions}) > 1


def test_end_token_is_kept_and_the_cap_holds(engines: Engines) -> None:
    # Any of 64 tokens ends a response, so that both ends of a response occur.
    ends = (END, *range(200, 263))
    completions = [c for group in generate(engines, sampling(max_tokens=8, stop_token_ids=ends)) for c in group]
    reasons = {completion.finish for completion in completions}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
    for completion in completions:
        assert not set(completion.token_ids[:-1]) & set(ends)
        if completion.finish is FinishReason.STOP:
            assert completion.token_ids[-1] in ends
        else:
            assert completion.length == 8
            assert completion.token_ids[-1] not in ends
        assert completion.versions == (VersionSpan(0, 0, completion.length),)


def test_only_the_given_tokens_stop_a_response(engines: Engines) -> None:
    completions = [c for group in generate(engines, sampling(stop_token_ids=()), n=32) for c in group]
    assert all(c.finish is FinishReason.LENGTH for c in completions)
    assert any(END in c.token_ids for c in completions)


def test_text_is_the_decoded_response(engines: Engines, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for completion in generate(engines, sampling(max_tokens=5))[0]:
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_a_refused_request_says_why(engines: Engines) -> None:
    too_long = Prompt("long", tuple([5] * 500), "", "")
    with pytest.raises(EngineError, match=r"engine 0.*prompt long: HTTP 400[\s\S]*is running"):
        engines.run(engines.generate(too_long, sampling(), 1))


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_cancels_the_requests_in_flight(
    engines: Engines, number: signal.Signals, raised: type[BaseException]
) -> None:
    started = time.monotonic()
    cancelled: list[str] = []

    async def ask(prompt: Prompt) -> None:
        try:
            await engines.generate(prompt, sampling(stop_token_ids=()), 500)
        except asyncio.CancelledError:
            cancelled.append(prompt.uid)
            raise

    async def interrupted() -> None:
        asyncio.get_running_loop().call_later(0.3, os.kill, os.getpid(), number)
        await asyncio.gather(*map(ask, PROMPTS))

    old = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with pytest.raises(raised):
            engines.run(interrupted())
    finally:
        signal.signal(signal.SIGTERM, old)
    assert time.monotonic() - started < 2.0
    assert len(cancelled) == len(PROMPTS)
    assert len(engines.run(engines.generate(PROMPTS[0], sampling(max_tokens=1), 2))) == 2


def test_a_killed_engine_is_noticed_and_nothing_is_left_behind(engines: Engines) -> None:
    """Last, because it ends the engine of this module."""
    (guard,) = [p for p in psutil.Process().children() if "dapo_megatron.rollout.guard" in p.cmdline()]
    family = guard.children(recursive=True)
    assert len(family) >= 2
    listening = {c.laddr for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening
    assert all(address.ip == "127.0.0.1" for address in listening)
    for address in listening:
        with pytest.raises(ConfigError, match="in use"):
            reserve_port(*address).close()

    async def killed_meanwhile() -> None:
        asyncio.get_running_loop().call_later(0.3, family[-1].kill)
        await asyncio.gather(*(engines.generate(prompt, sampling(stop_token_ids=()), 500) for prompt in PROMPTS))

    started = time.monotonic()
    with pytest.raises(EngineError, match="engine 0") as failure:
        engines.run(killed_meanwhile())
    assert time.monotonic() - started < 5.0
    assert "engine0.log" in str(failure.value)

    started = time.monotonic()
    engines.close()
    assert time.monotonic() - started < 8.0
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    for address in listening:
        reserve_port(*address).close()
