"""What needs no vLLM: the command line, the environment, and the reading of answers from a stand-in server."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from dapo_megatron.config import Config
from dapo_megatron.config_file import parse
from dapo_megatron.errors import ConfigError, EngineError
from dapo_megatron.rollout.engine import Sampling
from dapo_megatron.rollout.server import Server
from dapo_megatron.rollout.vllm import VllmEngine, vllm_command, vllm_env
from dapo_megatron.types import FinishReason, Prompt, VersionSpan

PROMPT = Prompt("train.jsonl:7", (3, 4), "", "")
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=4, stop_token_ids=(2,))
CHOICE = {
    "token_ids": [9, 2],
    "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -0.25}]},
    "finish_reason": "stop",
}


def config(**sections: Any) -> Config:
    values: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return parse(values)


def argument(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_replicas_sample_with_seeds_of_their_own() -> None:
    def seed(run: Config, replica: int) -> int:
        return int(argument(vllm_command(run, replica, 8000), "--seed"))

    # Neighbouring runs and replicas: sums of seed and replica would coincide.
    runs = [config(train={"seed": seed}) for seed in range(4)]
    seeds = {seed(run, replica) for run in runs for replica in range(4)}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seed(runs[0], 1) == 0xEF134F2A & 0x7FFF_FFFF
    assert seed(config(train={"seed": 5}, engine={"seed": 2}), 3) == seed(runs[2], 3)


def test_code_of_a_checkpoint_runs_only_where_the_config_says_so() -> None:
    assert "--trust-remote-code" not in vllm_command(config(), 0, 8000)
    assert "--trust-remote-code" in vllm_command(config(model={"trust_remote_code": True}), 0, 8000)


def test_extra_arguments_come_last() -> None:
    assert vllm_command(config(engine={"extra_args": ["--max-num-seqs", "7"]}), 0, 8000)[-2:] == ["--max-num-seqs", "7"]


def test_what_torchrun_told_the_ranks_is_not_told_to_engines() -> None:
    torchrun = dict.fromkeys(
        [
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
            "TORCHELASTIC_RUN_ID",
            "MKL_NUM_THREADS",
        ],
        "1",
    )
    env = vllm_env(config(), 0, torchrun | {"PATH": "/bin", "NCCL_DEBUG": "INFO"})
    assert not torchrun.keys() & env.keys()
    assert (env["PATH"], env["NCCL_DEBUG"]) == ("/bin", "INFO")


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("ranks", "inherited", "gpus"),
    [
        (2, {}, ["2", "3"]),
        (0, {}, ["0", "1"]),
        (None, {}, ["1", "2"]),
        (None, {"LOCAL_WORLD_SIZE": "2"}, ["2", "3"]),
        (2, {"CUDA_VISIBLE_DEVICES": "7,5,GPU-a,GPU-b"}, ["GPU-a", "GPU-b"]),
    ],
)
def test_engines_get_the_gpus_after_those_of_the_ranks(
    ranks: int | None, inherited: dict[str, str], gpus: list[str]
) -> None:
    two = config(engine={"replicas": 2})
    given = [vllm_env(two, replica, inherited, ranks)["CUDA_VISIBLE_DEVICES"] for replica in (0, 1)]
    assert given == gpus
    assert vllm_env(config(engine={"tensor_parallel": 2}), 0, inherited, ranks)["CUDA_VISIBLE_DEVICES"] == ",".join(
        gpus
    )


@pytest.mark.usefixtures("four_gpus")
def test_engines_never_get_the_gpus_of_the_ranks() -> None:
    with pytest.raises(ConfigError, match=r"ranks\(3\) \+ engine.replicas\(2\) x .*\(1\) = 5 GPUs, but 4 are visible"):
        vllm_env(config(engine={"replicas": 2}), 0, {"LOCAL_WORLD_SIZE": "3"})


def ask(
    tmp_path: Path,
    routes: dict[str, Callable[[web.Request], Awaitable[web.Response]]],
    work: Callable[[VllmEngine], Awaitable[Any]],
    request_seconds: float = 5.0,
) -> Any:
    async def main() -> Any:
        app = web.Application()
        for path, answer in routes.items():
            app.router.add_route("*", path, answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server = Server("engine 3", [sys.executable, "-c", "input()"], os.environ, tmp_path / "log", lambda: True)
        engine = VllmEngine(
            server,
            f"http://127.0.0.1:{runner.addresses[0][1]}",
            workers=1,
            decode=lambda ids: " ".join(map(str, ids)),
            request_seconds=request_seconds,
        )
        try:
            return await work(engine)
        finally:
            await engine.close()
            await runner.cleanup()

    return asyncio.run(main())


def answering(body: Any, status: int = 200) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response(body, status=status)

    return answer


async def silent(request: web.Request) -> web.Response:
    return web.Response()


def test_an_engine_that_reports_no_versions_is_given_those_that_were_sent(tmp_path: Path) -> None:
    done = answering({})
    routes = {
        "/inference/v1/generate": answering({"choices": [CHOICE]}),
        "/finish_weight_update": done,
        "/reset_prefix_cache": silent,
        "/resume": done,
    }

    async def work(engine: VllmEngine) -> list[Any]:
        before = await engine.generate(PROMPT, SAMPLING, 1)
        await engine.finish_update(6)
        return before + await engine.generate(PROMPT, SAMPLING, 1)

    before, after = ask(tmp_path, routes, work)
    assert (before.token_ids, before.logprobs, before.text) == ((9, 2), (-0.5, -0.25), "9 2")
    assert before.finish is FinishReason.STOP
    assert (before.versions, after.versions) == ((VersionSpan(0, 0, 2),), (VersionSpan(6, 0, 2),))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"choices": [CHOICE, CHOICE]}, "asked for 1 responses to prompt train.jsonl:7, got 2"),
        ({"choices": [CHOICE | {"finish_reason": "error"}]}, "a response ended with 'error'"),
        ({"error": "busy"}, r"prompt train.jsonl:7: cannot read the answer \(KeyError: 'choices'\): {'error': 'busy'}"),
        ({"choices": 3}, r"cannot read the answer \(TypeError: "),
        ([], r"cannot read the answer \(TypeError: .*\): \[\]"),
        ({"choices": [{"token_ids": [9, 2]}]}, r"\(KeyError: 'finish_reason'\)"),
        ({"choices": [CHOICE | {"logprobs": None}]}, r"\(TypeError: "),
        ({"choices": [CHOICE | {"logprobs": {"content": [{"logprob": None}] * 2}}]}, r"\(TypeError: "),
        ({"choices": [CHOICE | {"token_ids": [9]}]}, r"\(ValueError: 1 tokens but 2 log-probs\)"),
        ({"choices": [CHOICE | {"weight_versions": [{"version": "x", "start": 0, "end": 2}]}]}, r"\(ValueError: "),
    ],
)
def test_strange_answers_are_errors(tmp_path: Path, answer: Any, message: str) -> None:
    routes = {"/inference/v1/generate": answering(answer)}
    with pytest.raises(EngineError, match=f"engine 3.*{message}"):
        ask(tmp_path, routes, lambda engine: engine.generate(PROMPT, SAMPLING, 1))


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ("<html>\x1b[2J gateway", r"JSONDecodeError: .*\): b'<html>\\x1b\[2J gateway'$"),
        ("", "NoneType"),
        ("[" * 10_000, r"\[ \.\.\.$"),
    ],
)
def test_an_answer_that_is_not_json_is_an_error_and_its_start_is_shown(tmp_path: Path, body: str, shown: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=body, content_type="text/html")

    with pytest.raises(EngineError, match=f"engine 3, generating for prompt train.jsonl:7: .*{shown}") as failure:
        ask(
            tmp_path,
            {"/inference/v1/generate": answer},
            lambda engine: engine.generate(PROMPT, SAMPLING, 1),
        )
    assert len(str(failure.value)) < 1000
    assert str(failure.value).isprintable()


@pytest.mark.parametrize("path", ["/reset_prefix_cache", "/weight_info"])
def test_what_is_asked_after_an_update_is_read_with_the_same_care(tmp_path: Path, path: str) -> None:
    routes = {path: answering({}) for path in ("/finish_weight_update", "/weight_info", "/resume")}
    routes["/reset_prefix_cache"] = answering({"success": True})
    routes[path] = answering(["strange"])
    with pytest.raises(EngineError, match=rf"engine 3, {path}: cannot read the answer .*: \['strange'\]"):
        ask(tmp_path, routes, lambda engine: engine.finish_update(6))


def test_a_wrong_version_after_an_update_is_an_error(tmp_path: Path) -> None:
    routes = {path: answering({}) for path in ("/finish_weight_update", "/resume")}
    routes["/reset_prefix_cache"] = answering({"success": True})
    routes["/weight_info"] = answering({"weight_version": "5"})
    with pytest.raises(EngineError, match="engine 3 holds weights of version '5' after an update to 6"):
        ask(tmp_path, routes, lambda engine: engine.finish_update(6))


def test_a_prefix_cache_that_stays_full_is_an_error(tmp_path: Path) -> None:
    routes = {"/finish_weight_update": answering({}), "/reset_prefix_cache": answering({"success": False})}
    with pytest.raises(EngineError, match="did not empty its prefix cache"):
        ask(tmp_path, routes, lambda engine: engine.finish_update(6))


def test_an_engine_that_does_not_answer_in_time_is_an_error(tmp_path: Path) -> None:
    async def never(request: web.Request) -> web.Response:
        await asyncio.sleep(3)
        return web.json_response({})

    with pytest.raises(EngineError, match=r"prompt train.jsonl:7: no answer within 0.3 s"):
        ask(
            tmp_path,
            {"/inference/v1/generate": never},
            lambda engine: engine.generate(PROMPT, SAMPLING, 1),
            request_seconds=0.3,
        )
