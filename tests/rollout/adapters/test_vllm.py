"""What needs no vLLM: the command line, the environment, and the reading of answers from a stand-in server."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from dapo_megatron.config_file import parse
from dapo_megatron.errors import ConfigError, EngineError
from dapo_megatron.rollout.adapters.vllm import Adapter
from dapo_megatron.rollout.answer import GENERATE, PROGRESS, encode
from dapo_megatron.rollout.engine import KV_CACHE, WEIGHTS, Engine, Progress, Sampling
from dapo_megatron.rollout.place import Place
from dapo_megatron.rollout.server import StartedServer
from dapo_megatron.types import FinishReason, Prompt, VersionSpan
from tests.helpers.completions import completion

PROMPT = Prompt("train.jsonl:7", (3, 4), "", "")
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=4, stop_token_ids=(2,))
WRITTEN = completion([9, 2], [-0.5, -0.25], versions=[])

CPU = Place(index=0, host="127.0.0.1", port=8000, gpus=(), memory_fraction=0.4, seed=17)


def adapter(**sections: Any) -> Adapter:
    values: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return Adapter(parse(values))


def argument(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_command_follows_the_place() -> None:
    command = adapter().command(replace(CPU, host="::1", port=8003))
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert [argument(command, name) for name in ("--host", "--port", "--seed")] == ["::1", "8003", "17"]


def test_gpu_and_cpu_differ_in_what_concerns_them() -> None:
    gpu, two = replace(CPU, gpus=("0", "1")), {"tensor_parallel": 2}
    assert "--gpu-memory-utilization" in adapter().command(gpu) and "--enforce-eager" not in adapter().command(gpu)
    assert "--gpu-memory-utilization" not in adapter().command(CPU) and "--enforce-eager" in adapter().command(CPU)
    assert argument(adapter().command(CPU), "--distributed-executor-backend") == "uni"
    assert "--distributed-executor-backend" not in adapter(engine=two).command(CPU)
    assert adapter().environment(CPU)["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert adapter(engine=two).environment(CPU)["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
    assert adapter(engine=two).environment(CPU)["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in adapter().environment(CPU)


@pytest.mark.vllm
@pytest.mark.parametrize("python", [None, sys.executable], ids=["here", "elsewhere"])
def test_heads_for_which_there_is_no_kernel_on_cpu(monkeypatch: pytest.MonkeyPatch, python: str | None) -> None:
    """Which ones there are, the installed vLLM says."""
    checked = adapter(engine={"python": python})
    tiny = SimpleNamespace(num_attention_heads=4, hidden_size=32)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for size in (64, 128):
        checked.check(SimpleNamespace(num_attention_heads=4, hidden_size=4 * size))
        checked.check(SimpleNamespace(**vars(tiny), head_dim=size))
    with pytest.raises(ConfigError, match=r"heads of this model have 8 numbers .* on CPU has 32, 64, .*128, "):
        checked.check(tiny)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    checked.check(tiny)


@pytest.mark.parametrize("source", [None, "def get_supported_head_sizes(): return FOUND", "def"])
def test_a_vllm_that_does_not_say_which_heads_it_has_is_asked_by_running_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | None
) -> None:
    if source:
        path = tmp_path / "v1/attention/backends/cpu_attn.py"
        path.parent.mkdir(parents=True)
        path.write_text(source)
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("dapo_megatron.rollout.adapters.vllm.find_spec", lambda name: spec)
    adapter().check(SimpleNamespace(num_attention_heads=4, hidden_size=32))


def test_memory_on_gpus_is_a_share_of_each_and_a_cache_of_a_given_size_lies_within() -> None:
    gpu = replace(CPU, gpus=("0",))
    assert argument(adapter().command(gpu), "--gpu-memory-utilization") == "0.4"
    assert "--kv-cache-memory-bytes" not in adapter().command(gpu)
    command = adapter(engine={"kv_cache_gib": 3}).command(gpu)
    assert argument(command, "--kv-cache-memory-bytes") == "3221225472"
    # vLLM's own share, 0.92, would have to be free at the start.
    assert argument(command, "--gpu-memory-utilization") == "0.4"
    assert "VLLM_CPU_KVCACHE_SPACE" not in adapter(engine={"kv_cache_gib": 3}).environment(gpu)


def test_memory_on_cpu_is_the_cache() -> None:
    assert adapter().environment(CPU)["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert adapter(engine={"kv_cache_gib": 3}).environment(CPU)["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert "--kv-cache-memory-bytes" not in adapter(engine={"kv_cache_gib": 3}).command(CPU)


def test_on_cpu_whole_prompts_go_through_the_model_however_long_and_many() -> None:
    command = adapter().command(CPU)
    assert "--no-enable-chunked-prefill" in command
    assert argument(command, "--max-num-batched-tokens") == str(2048 + 20_480)
    small = {
        "data": {"max_prompt_tokens": 16},
        "rollout": {"max_response_tokens": 64},
        "reward": {"overlong": {"cache": 16}},
    }
    assert argument(adapter(**small).command(CPU), "--max-num-batched-tokens") == "8192"
    many = adapter(**small, engine={"max_sequences": 9000}).command(CPU)
    assert argument(many, "--max-num-batched-tokens") == "9000"
    assert "--max-num-batched-tokens" not in adapter().command(replace(CPU, gpus=("0",)))


def test_no_two_engines_write_to_one_cache_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    caches = [adapter().environment(replace(CPU, gpus=(gpu, "7")))["VLLM_CACHE_ROOT"] for gpu in ("0", "4")]
    assert caches == [f"/shared/vllm/{socket.gethostname()}-gpu{gpu}" for gpu in "04"]
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/mine")
    assert "VLLM_CACHE_ROOT" not in adapter().environment(replace(CPU, gpus=("0",)))


def test_batch_invariant_kernels_are_for_gpus() -> None:
    on, gpu = {"batch_invariant": True}, replace(CPU, gpus=("0",))
    assert adapter(engine=on).environment(gpu)["VLLM_BATCH_INVARIANT"] == "1"
    assert "VLLM_BATCH_INVARIANT" not in adapter().environment(gpu)
    assert "VLLM_BATCH_INVARIANT" not in adapter(engine=on).environment(CPU)


def test_a_python_of_its_own_runs_the_engine() -> None:
    assert adapter(engine={"python": "/venv/bin/python"}).command(CPU)[0] == "/venv/bin/python"


def test_code_of_a_checkpoint_runs_only_where_the_config_says_so() -> None:
    assert "--trust-remote-code" not in adapter().command(CPU)
    assert "--trust-remote-code" in adapter(model={"trust_remote_code": True}).command(CPU)


def test_extra_arguments_come_last() -> None:
    assert adapter(engine={"extra_args": ["--max-num-seqs", "7"]}).command(CPU)[-2:] == ["--max-num-seqs", "7"]


def ask(
    tmp_path: Path,
    routes: dict[str, Callable[[web.Request], Awaitable[web.Response]]],
    work: Callable[[Engine], Awaitable[Any]],
    **sections: Any,
) -> Any:
    async def main() -> Any:
        app = web.Application()
        for path, answer in {"/collective_rpc": answering({"results": [None, None]}), **routes}.items():
            app.router.add_route("*", path, answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server = StartedServer(
            "engine 3", [sys.executable, "-c", "input()"], os.environ, tmp_path / "log", lambda: True
        )
        place = replace(CPU, port=runner.addresses[0][1])
        engine = adapter(**sections).connect(server, place)
        try:
            return await work(engine)
        finally:
            await engine.close()
            server.close()
            await runner.cleanup()

    return asyncio.run(main())


def answering(body: Any, status: int = 200) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(request: web.Request) -> web.Response:
        if isinstance(body, bytes):
            return web.Response(body=body, status=status)
        return web.json_response(body, status=status)

    return answer


async def silent(request: web.Request) -> web.Response:
    return web.Response()


def test_an_engine_that_reports_no_versions_is_given_those_that_were_sent(tmp_path: Path) -> None:
    done = answering({})
    routes = {
        GENERATE: answering(encode([WRITTEN])),
        "/finish_weight_update": done,
        "/reset_prefix_cache": silent,
        "/resume": done,
    }

    async def work(engine: Engine) -> list[Any]:
        before = await engine.generate(PROMPT, SAMPLING, 1)
        await engine.finish_transfer(6)
        return before + await engine.generate(PROMPT, SAMPLING, 1)

    before, after = ask(tmp_path, routes, work)
    assert (before.token_ids.tolist(), before.logprobs.tolist()) == ([9, 2], [-0.5, -0.25])
    assert before.finish is FinishReason.STOP
    assert (before.versions, after.versions) == ((VersionSpan(0, 0, 2),), (VersionSpan(6, 0, 2),))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (encode([WRITTEN, WRITTEN]), "asked for 1 responses to prompt train.jsonl:7, got 2"),
        (b"", r"prompt train.jsonl:7: cannot read the answer \(ValueError: .*\): b''"),
        (b"<html>\x1b[2J busy" * 1000, r"cannot read the answer .*: b'<html>\\x1b\[2J busy.* \.\.\.$"),
    ],
)
def test_strange_answers_are_errors(tmp_path: Path, answer: bytes, message: str) -> None:
    routes = {GENERATE: answering(answer)}
    with pytest.raises(EngineError, match=f"engine 3.*{message}"):
        ask(tmp_path, routes, lambda engine: engine.generate(PROMPT, SAMPLING, 1))


def test_what_is_asked_of_an_engine_is_the_sampling_and_no_more(tmp_path: Path) -> None:
    asked: list[Any] = []

    async def keep(request: web.Request) -> web.Response:
        asked.append(await request.json())
        return web.Response(body=encode([WRITTEN]))

    ask(tmp_path, {GENERATE: keep}, lambda engine: engine.generate(PROMPT, replace(SAMPLING, seed=2**62 - 1), 1))
    how = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 4, "stop_token_ids": [2], "seed": 2**62 - 1}
    assert asked == [{"token_ids": [3, 4], "n": 1, **how}]


def test_progress_is_read_with_care(tmp_path: Path) -> None:
    def look(answer: Any) -> Any:
        return ask(tmp_path, {PROGRESS: answering(answer)}, lambda engine: engine.progress())

    assert look({"tokens": 7, "finished": 1}) == Progress(7, 1)
    for strange in ([1], {"tokens": 7}, {"tokens": 7, "finished": 1, "more": 0}):
        with pytest.raises(EngineError, match=r"engine 3, .*cannot read the answer"):
            look(strange)


def test_no_request_waits_for_another(tmp_path: Path) -> None:
    """However many responses are being written, an engine hears of weights and tells its progress at once."""
    released = asyncio.Event()
    writing = 0

    async def write(request: web.Request) -> web.Response:
        nonlocal writing
        writing += 1
        await released.wait()
        return web.Response(body=encode([WRITTEN]))

    async def work(engine: Engine) -> None:
        requests = [asyncio.create_task(engine.generate(PROMPT, SAMPLING, 1)) for _ in range(300)]
        async with asyncio.timeout(10):
            while writing < len(requests):
                await asyncio.sleep(0.01)
            await engine.begin_transfer()
            released.set()
            await asyncio.gather(*requests)

    ask(tmp_path, {GENERATE: write, "/pause": answering({}), "/start_weight_update": answering({})}, work)


@pytest.mark.parametrize(
    ("path", "request_of"),
    [
        ("/init_weight_transfer_engine", lambda engine: engine.join_group({})),
        ("/pause", lambda engine: engine.begin_transfer()),
        ("/start_weight_update", lambda engine: engine.begin_transfer()),
        ("/update_weights", lambda engine: engine.receive({"tensors": [], "checksums": None})),
        ("/finish_weight_update", lambda engine: engine.finish_transfer(6)),
        ("/reset_prefix_cache", lambda engine: engine.finish_transfer(6)),
        ("/resume", lambda engine: engine.finish_transfer(6)),
        ("/sleep", lambda engine: engine.sleep()),
    ],
)
def test_what_belongs_to_a_transfer_has_the_limit_of_a_push(
    tmp_path: Path, path: str, request_of: Callable[[Engine], Awaitable[None]]
) -> None:
    """A model that loads a bucket for longer than an engine may be silent is at work, as its server says."""

    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(0.6)
        return web.json_response({"success": True})

    paths = ("/init_weight_transfer_engine", "/pause", "/start_weight_update", "/update_weights", "/sleep")
    routes = {path: answering({}) for path in (*paths, "/finish_weight_update", "/resume")}
    routes |= {"/reset_prefix_cache": answering({"success": True}), path: slow}
    ask(tmp_path, routes, request_of, engine={"stall_seconds": 0.2})
    with pytest.raises(EngineError, match=rf"engine 3, {path}.*: no answer within 0.2 s \(weights.push_seconds\)"):
        ask(tmp_path, routes, request_of, weights={"push_seconds": 0.2})


def test_progress_has_the_limit_of_a_sign_of_life(tmp_path: Path) -> None:
    async def never(request: web.Request) -> web.Response:
        await asyncio.sleep(3)
        return web.Response()

    with pytest.raises(EngineError, match=rf"engine 3, {PROGRESS}: no answer within 0.2 s \(engine.stall_seconds\)"):
        ask(tmp_path, {PROGRESS: never}, lambda engine: engine.progress(), engine={"stall_seconds": 0.2})


def test_a_push_that_another_run_left_open_is_ended(tmp_path: Path) -> None:
    asked: list[tuple[str, Any]] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append((request.path, await request.json()))
        return web.json_response({})

    ask(tmp_path, dict.fromkeys(("/collective_rpc", "/resume"), answer), lambda engine: engine.reset())
    assert asked == [("/collective_rpc", {"method": "abandon_update"}), ("/resume", {})]


@pytest.mark.parametrize(
    ("path", "request_of"),
    [
        ("/init_weight_transfer_engine", lambda engine: engine.join_group({})),
        ("/start_weight_update", lambda engine: engine.begin_transfer()),
        ("/update_weights", lambda engine: engine.receive({"tensors": [], "checksums": None})),
        ("/finish_weight_update", lambda engine: engine.finish_transfer(6)),
    ],
)
def test_what_any_worker_says_of_a_part_of_a_push_is_the_engines_error(
    tmp_path: Path, path: str, request_of: Callable[[Engine], Awaitable[None]]
) -> None:
    routes = dict.fromkeys((path, "/pause"), answering({}))
    routes["/collective_rpc"] = answering({"results": [None, "TransferError: a is b", "TransferError: a is b"]})
    with pytest.raises(EngineError, match=rf"^engine 3, {path}: TransferError: a is b\nengine 3 has not ended"):
        ask(tmp_path, routes, request_of)


class Sleeper:
    """A stand-in for vLLM's server that sleeps, and notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.asleep: set[str] = set()

    @property
    def routes(self) -> dict[str, Callable[[web.Request], Awaitable[web.Response]]]:
        paths = ("/sleep", "/wake_up", "/is_sleeping", "/pause", "/resume", "/start_weight_update")
        return dict.fromkeys((*paths, "/finish_weight_update", "/reset_prefix_cache", "/weight_info"), self._answer)

    async def _answer(self, request: web.Request) -> web.Response:
        if request.path == "/is_sleeping":
            return web.json_response({"is_sleeping": bool(self.asleep)})
        self.asked.append(str(request.rel_url))
        if request.path == "/sleep":
            self.asleep = {"weights", "kv_cache"}
        if request.path == "/wake_up":
            self.asleep -= set(request.query.getall("tags"))
        return web.json_response({"success": True})


def test_a_push_to_an_engine_that_sleeps_lets_it_go_on_once_it_has_a_cache(tmp_path: Path) -> None:
    server = Sleeper()

    async def work(engine: Engine) -> None:
        for _ in range(2):
            await engine.sleep()
        for _ in range(2):
            await engine.wake(WEIGHTS)
        await engine.begin_transfer()
        await engine.finish_transfer(6)
        for _ in range(2):
            await engine.wake(WEIGHTS, KV_CACHE)
        await engine.begin_transfer()
        await engine.finish_transfer(7)

    ask(tmp_path, server.routes, work)
    finishing = ["/finish_weight_update", "/reset_prefix_cache", "/weight_info"]
    assert server.asked == [
        *("/sleep?level=2&mode=abort", "/wake_up?tags=weights"),
        *("/start_weight_update", *finishing),
        "/wake_up?tags=kv_cache",
        *("/pause?mode=wait", "/start_weight_update", *finishing, "/resume"),
    ]


def test_an_engine_that_stays_asleep_is_an_error(tmp_path: Path) -> None:
    server = Sleeper()

    async def work(engine: Engine) -> None:
        await engine.sleep()
        server.asleep.add("scheduling")
        await engine.wake(WEIGHTS)
        await engine.wake(KV_CACHE)

    with pytest.raises(EngineError, match=r"engine 3 sleeps after it was woken for \['kv_cache'\]"):
        ask(tmp_path, server.routes, work)


def test_an_engine_that_sleeps_forgets_and_is_told_on_gpus_that_it_will() -> None:
    server: Any = SimpleNamespace(name="engine 0", version=0)
    gpu = replace(CPU, gpus=("0",))
    for here in (CPU, gpu):
        assert adapter().connect(server, here).keeps and "--enable-sleep-mode" not in adapter().command(here)
        assert not adapter().connect(server, replace(here, sleeps=True)).keeps
    assert "--enable-sleep-mode" in adapter().command(replace(gpu, sleeps=True))
    assert "--enable-sleep-mode" not in adapter().command(replace(CPU, sleeps=True)), "the CPU build refuses it"


@pytest.mark.parametrize("path", ["/reset_prefix_cache", "/weight_info"])
def test_what_is_asked_after_a_transfer_is_read_with_the_same_care(tmp_path: Path, path: str) -> None:
    routes = {path: answering({}) for path in ("/finish_weight_update", "/weight_info", "/resume")}
    routes["/reset_prefix_cache"] = answering({"success": True})
    routes[path] = answering(["strange"])
    with pytest.raises(EngineError, match=rf"engine 3, {path}: cannot read the answer .*: \['strange'\]"):
        ask(tmp_path, routes, lambda engine: engine.finish_transfer(6))


def test_a_wrong_version_after_a_transfer_is_an_error(tmp_path: Path) -> None:
    routes = {path: answering({}) for path in ("/finish_weight_update", "/resume")}
    routes["/reset_prefix_cache"] = answering({"success": True})
    routes["/weight_info"] = answering({"weight_version": "5"})
    with pytest.raises(EngineError, match="engine 3 holds weights of version '5' after a transfer of version 6"):
        ask(tmp_path, routes, lambda engine: engine.finish_transfer(6))


def test_a_prefix_cache_that_stays_full_is_an_error(tmp_path: Path) -> None:
    routes = {"/finish_weight_update": answering({}), "/reset_prefix_cache": answering({"success": False})}
    with pytest.raises(EngineError, match="did not empty its prefix cache"):
        ask(tmp_path, routes, lambda engine: engine.finish_transfer(6))
