"""A real vLLM server on CPU, against the Hugging Face model in float32."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from dapo_megatron.config_file import parse
from dapo_megatron.errors import ConfigError, EngineError
from dapo_megatron.rollout.adapters.vllm import Adapter, VllmEngine
from dapo_megatron.rollout.answer import GENERATE
from dapo_megatron.rollout.client import Client
from dapo_megatron.rollout.engine import KV_CACHE, WEIGHTS, Engine, Progress, Sampling
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.rollout.place import Place
from dapo_megatron.rollout.ports import reserve_port
from dapo_megatron.types import Completion, FinishReason, Prompt, VersionSpan
from tests.helpers.tokens import assert_closed

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

END = 2
PROMPTS = [Prompt(f"p{i}", tuple(3 + (13 * i + 7 * j) % 250 for j in range(5 + i)), "", "") for i in range(6)]


def sampling(**changes: Any) -> Sampling:
    return Sampling(**{"temperature": 1.0, "top_p": 1.0, "max_tokens": 64, "stop_token_ids": (END,)} | changes)


@pytest.fixture(scope="module")
def engines(
    tiny_model: Path, tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engines]:
    with closing(Engines(parse(tiny_values), tmp_path_factory.mktemp("run"), ranks=0)) as engines:
        engines.wait_ready()
        yield engines


@pytest.fixture(scope="module")
def hf(tiny_model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def generate(engines: Engines, how: Sampling, n: int = 4) -> list[list[Completion]]:
    async def all_prompts() -> list[list[Completion]]:
        return await asyncio.gather(*(engines.generate(prompt, how, n) for prompt in PROMPTS))

    return engines.run(all_prompts())


def control(engine: Engine) -> Client:
    assert isinstance(engine, VllmEngine)
    return engine.control


@torch.no_grad()
def hf_logprobs(model: torch.nn.Module, prompt: Prompt, completion: Completion, temperature: float) -> torch.Tensor:
    tokens = torch.tensor([[*prompt.token_ids, *completion.token_ids.tolist()]])
    logits = model(tokens).logits[0, len(prompt.token_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.from_numpy(completion.token_ids).long()[:, None])[:, 0]


@pytest.mark.parametrize("gpus", [(), ("0", "1")])
def test_vllm_knows_every_argument_and_variable(gpus: tuple[str, ...]) -> None:
    """Those for GPUs as well, where no engine can be started."""
    from vllm import envs
    from vllm.entrypoints.cli import serve  # where every version has its parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    values = {
        "model": {"path": "m", "trust_remote_code": True},
        "data": {"train": "t.jsonl"},
        "engine": {"kv_cache_gib": 3},
    }
    place = Place(index=0, host="127.0.0.1", port=8000, gpus=gpus, memory_fraction=0.4, seed=17, sleeps=True)
    adapter = Adapter(parse(values))
    parser: Any = vars(serve)["make_arg_parser"](FlexibleArgumentParser())
    arguments = parser.parse_args(adapter.command(place)[3:])
    assert (arguments.logprobs_mode, arguments.seed) == ("processed_logprobs", 17)
    if gpus:
        assert (arguments.gpu_memory_utilization, arguments.kv_cache_memory_bytes) == (0.4, 3 << 30)
        assert arguments.enable_sleep_mode
    variables = {name for name in adapter.environment(place) if name.startswith("VLLM_")}
    assert variables and not variables - set(envs.environment_variables)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_sampling_distribution(
    engines: Engines, hf: torch.nn.Module, temperature: float
) -> None:
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


def test_every_prompt_gets_n_different_responses(engines: Engines) -> None:
    for completions in generate(engines, sampling(), n=7):
        assert len(completions) == 7
        assert len({completion.token_ids.tobytes() for completion in completions}) > 1


def test_end_token_is_kept_and_the_cap_holds(engines: Engines) -> None:
    # Any of 24 tokens ends a response: about half of 96 responses end within 8 tokens.
    ends = (END, *range(200, 223))
    completions = [c for group in generate(engines, sampling(max_tokens=8, stop_token_ids=ends), n=16) for c in group]
    reasons = {completion.finish for completion in completions}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
    for completion in completions:
        assert not set(completion.token_ids[:-1].tolist()) & set(ends)
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


def test_answers_are_those_of_vllms_own_endpoint(engines: Engines) -> None:
    """What is most likely, as JSON of OpenAI's shape: the same tokens, log-probs and ends."""
    (engine,) = engines

    async def asked_of_vllm(prompt: Prompt, how: Sampling) -> list[Any]:
        params = asdict(how) | {"ignore_eos": True, "logprobs": 0}
        body = {"token_ids": prompt.token_ids, "sampling_params": params}
        return (await control(engine).call("POST", "/inference/v1/generate", body))["choices"]

    async def both(prompt: Prompt, how: Sampling) -> tuple[list[Completion], list[Any]]:
        return await engine.generate(prompt, how, 1), await asked_of_vllm(prompt, how)

    reasons = set()
    for index, prompt in enumerate(PROMPTS):
        ends = (END, *range(200, 230)) if index % 2 else ()
        how = sampling(temperature=0.0, max_tokens=40, stop_token_ids=ends)
        completions, choices = engines.run(both(prompt, how))
        for completion, choice in zip(completions, choices, strict=True):
            assert completion.token_ids.tolist() == choice["token_ids"]
            logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
            assert completion.logprobs.tolist() == pytest.approx(logprobs, abs=1e-6)
            assert completion.finish == choice["finish_reason"]
            reasons.add(completion.finish)
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}


def test_the_shortest_prompt_and_the_shortest_response(engines: Engines) -> None:
    """A prompt of one token, and responses that are an end token and nothing else."""
    everything = tuple(range(264))
    (only,) = engines.run(engines.generate(Prompt("one", (5,), "", ""), sampling(stop_token_ids=everything), 1))
    assert (only.length, only.finish, only.logprobs.shape) == (1, FinishReason.STOP, (1,))
    cut = engines.run(engines.generate(Prompt("one", (5,), "", ""), sampling(max_tokens=1, stop_token_ids=()), 3))
    assert [(completion.length, completion.finish) for completion in cut] == [(1, FinishReason.LENGTH)] * 3


def test_what_the_cache_had_of_a_prompt_is_counted(engines: Engines) -> None:
    """In whole blocks, of 128 tokens on CPU."""
    long = Prompt("long", tuple(3 + 7 * j % 250 for j in range(130)), "", "")
    asked = [engines.run(engines.generate(long, sampling(max_tokens=2), 1)) for _ in range(2)]
    assert [completion.cached_tokens for (completion,) in asked] == [0, 128]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"token_ids": []}, ""),
        ({"token_ids": [5] * 500}, r"token_ids\(500\) \+ max_tokens\(4\) = 504 is more than --max-model-len\(192\)"),
        ({"token_ids": [3, 264]}, "from 0 to 263"),
        ({"token_ids": [-1]}, "from 0 to 263"),
        ({"token_ids": "34"}, "TypeError"),
        ({"n": 0}, "n must be"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids"),
        ({"n": None}, ""),
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


def test_a_refused_request_says_which_prompt_it_was_for(engines: Engines) -> None:
    too_long = Prompt("long", tuple([5] * 500), "", "")
    with pytest.raises(EngineError, match=r"engine 0.*prompt long: HTTP 400[\s\S]*has not ended"):
        engines.run(engines.generate(too_long, sampling(), 1))


CONTROL = {
    *("/pause", "/resume", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights"),
    *("/finish_weight_update", "/reset_prefix_cache", "/sleep", "/wake_up"),
}
"""Paths by which weights are changed."""


def test_without_the_token_no_path_is_open_and_it_is_nowhere_to_be_seen(engines: Engines) -> None:
    (engine,) = engines
    assert_closed(engines, control(engine), CONTROL)
    assert len(engines.run(engines.generate(PROMPTS[0], sampling(max_tokens=1), 1))) == 1
    about = engines.run(engine.about())
    assert (about.kind, about.dtype, about.workers, about.sequence_tokens) == ("vllm", "float32", 1, 192)
    assert (about.model["model_type"], about.model["vocab_size"]) == ("qwen2", 264)


def test_progress_is_that_of_what_is_being_written_and_ends_with_whoever_asked(engines: Engines) -> None:
    (engine,) = engines
    endless = sampling(stop_token_ids=())

    async def begin_and_leave() -> list[Progress]:
        looks = [await engine.progress()]
        tasks = [asyncio.create_task(engine.generate(prompt, endless, 200)) for prompt in PROMPTS]
        while looks[-1].tokens < 1000:
            looks.append(await engine.progress())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(5):  # far less than the rest would have taken
            while (last := await engine.progress()) != looks[0]:
                await asyncio.sleep(0.02)
        return [*looks, last]

    first, *looks, last = engines.run(begin_and_leave())
    assert first == last == Progress(0, 0)
    tokens = [look.tokens for look in looks]
    assert tokens == sorted(tokens) and tokens[-1] <= 200 * len(PROMPTS) * 64


def test_responses_that_ended_before_the_others_are_counted(engines: Engines) -> None:
    (engine,) = engines

    async def looks() -> list[int]:
        task = asyncio.create_task(engine.generate(PROMPTS[0], sampling(stop_token_ids=tuple(range(0, 264, 8))), 300))
        finished = []
        while not task.done():
            finished.append((await engine.progress()).finished)
        assert len(await task) == 300
        return finished

    finished = engines.run(looks())
    assert 0 < max(finished) < 300
    assert finished[: finished.index(max(finished))] == sorted(finished[: finished.index(max(finished))])


def test_one_that_sleeps_answers_nothing_and_the_same_when_it_is_awake(engines: Engines) -> None:
    """Books only: on CPU nothing is freed, and the weights are still there."""
    (engine,) = engines
    how = sampling(temperature=0.0)
    prompt = Prompt("long", tuple(3 + 7 * i % 250 for i in range(128)), "", "")

    async def state() -> bool:
        return (await control(engine).call("GET", "/is_sleeping"))["is_sleeping"]

    async def sleep_and_wake() -> tuple[Completion, Completion]:
        (before,) = await engine.generate(prompt, how, 1)
        written = asyncio.create_task(engine.generate(PROMPTS[0], sampling(max_tokens=180, stop_token_ids=()), 8))
        while not (await engine.progress()).tokens:
            await asyncio.sleep(0.01)
        await engine.sleep()
        assert FinishReason.ABORT in {completion.finish for completion in await written}
        assert await engine.progress() == Progress(0, 0) and await state()
        await engine.wake(WEIGHTS)
        asked = asyncio.create_task(engine.generate(prompt, how, 1))
        await asyncio.sleep(0.3)
        assert await state() and not asked.done()
        await engine.wake(WEIGHTS, KV_CACHE)
        (after,) = await asked
        assert not await state()
        return before, after

    before, after = engines.run(sleep_and_wake())
    assert before.token_ids.tolist() == after.token_ids.tolist()


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
    from vllm.utils import network_utils

    (guard,) = [p for p in psutil.Process().children() if "dapo_megatron.rollout.guard" in p.cmdline()]
    family = guard.children(recursive=True)
    assert len(family) >= 2
    listening = {c.laddr for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening
    everywhere = [address for address in listening if address.ip != "127.0.0.1"]
    # The ranks of vLLM 0.25 meet at torch's store, which knows no other address; those of 0.32 at a file.
    assert len(everywhere) == (not hasattr(network_utils, "get_file_store_init_method"))
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
