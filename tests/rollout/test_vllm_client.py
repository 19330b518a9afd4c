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
from dapo_megatron.errors import EngineError
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
    by_run, by_engine = config(train={"seed": 5}), config(train={"seed": 5}, engine={"seed": 40})
    assert [argument(vllm_command(by_run, replica, 8000), "--seed") for replica in (0, 1)] == ["5", "6"]
    assert argument(vllm_command(by_engine, 1, 8000), "--seed") == "41"


def test_code_of_a_checkpoint_runs_only_where_the_config_says_so() -> None:
    assert "--trust-remote-code" not in vllm_command(config(), 0, 8000)
    assert "--trust-remote-code" in vllm_command(config(model={"trust_remote_code": True}), 0, 8000)


def test_extra_arguments_come_last() -> None:
    assert vllm_command(config(engine={"extra_args": ["--max-num-seqs", "7"]}), 0, 8000)[-2:] == ["--max-num-seqs", "7"]


def test_what_torchrun_told_the_ranks_is_not_told_to_engines() -> None:
    torchrun = dict.fromkeys(
        ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"],
        "1",
    )
    env = vllm_env(config(), 0, torchrun | {"PATH": "/bin", "NCCL_DEBUG": "INFO"})
    assert not torchrun.keys() & env.keys()
    assert (env["PATH"], env["NCCL_DEBUG"]) == ("/bin", "INFO")


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


def test_an_engine_that_reports_no_versions_is_given_those_that_were_sent(tmp_path: Path) -> None:
    done = answering({})
    routes = {
        "/inference/v1/generate": answering({"choices": [CHOICE]}),
        "/finish_weight_update": done,
        "/reset_prefix_cache": done,
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
    ],
)
def test_strange_answers_are_errors(tmp_path: Path, answer: Any, message: str) -> None:
    routes = {"/inference/v1/generate": answering(answer)}
    with pytest.raises(EngineError, match=f"engine 3.*{message}"):
        ask(tmp_path, routes, lambda engine: engine.generate(PROMPT, SAMPLING, 1))


def test_a_wrong_version_after_an_update_is_an_error(tmp_path: Path) -> None:
    routes = {path: answering({}) for path in ("/finish_weight_update", "/reset_prefix_cache", "/resume")}
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
