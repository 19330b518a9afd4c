"""What needs no SGLang: the command line, the environment, and the reading of answers from a stand-in server."""

from __future__ import annotations

import asyncio
import json
import os
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
from dapo_megatron.rollout.adapter import adapter_for
from dapo_megatron.rollout.adapters import sglang
from dapo_megatron.rollout.adapters.sglang import Adapter
from dapo_megatron.rollout.answer import GENERATE, encode
from dapo_megatron.rollout.engine import KV_CACHE, WEIGHTS, Engine, Sampling
from dapo_megatron.rollout.place import Place
from dapo_megatron.rollout.server import StartedServer
from dapo_megatron.types import Prompt, VersionSpan
from tests.helpers.checkpoint import write_checkpoint
from tests.helpers.completions import completion

CPU = Place(index=0, host="127.0.0.1", port=8000, gpus=(), memory_fraction=0.4, seed=17)
GPU = replace(CPU, gpus=("0",))
MODEL = SimpleNamespace(num_attention_heads=4, hidden_size=32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.fixture
def venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where SGLang is looked for. Nothing is there."""
    python = tmp_path / ".venv-sglang/bin/python"
    monkeypatch.setattr(sglang, "_VENV", python)
    return python


def adapter(checkpoint: str | Path = "m", /, **sections: Any) -> Adapter:
    values: dict[str, Any] = {
        "model": {"path": str(checkpoint)},
        "data": {"train": "t.jsonl"},
        "engine": {"kind": "sglang"},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    made = adapter_for(parse(values), "sglang")
    assert isinstance(made, Adapter)
    return made


def argument(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_command_follows_the_place(model: Path) -> None:
    command = adapter(model).command(replace(CPU, host="::1", port=8003))
    assert command[1:4] == ["-m", "dapo_megatron.rollout.endpoints.sglang", "dapo_megatron.weights.workers.sglang"]
    assert [argument(command, name) for name in ("--host", "--port", "--random-seed")] == ["::1", "8003", "17"]


def test_the_modules_that_run_in_the_engine_are_there() -> None:
    package = Path(sglang.__file__).parents[3]
    for name in (sglang.SERVER, sglang.WORKER):
        assert (package / name.replace(".", "/")).with_suffix(".py").is_file()


def test_its_own_environment_is_found_beside_the_package(model: Path, venv: Path) -> None:
    missing = adapter(model)
    assert missing.command(CPU)[0] == sys.executable
    assert "make sglang-cpu" in missing.packages["sglang"]
    venv.parent.mkdir(parents=True)
    venv.touch()
    found = adapter(model)
    assert (found.command(CPU)[0], found.packages) == (str(venv), {})
    named = adapter(model, engine={"python": "/venv/bin/python"})
    assert named.command(CPU)[0] == "/venv/bin/python" and "sglang" in named.packages


def test_an_environment_for_cpu_is_not_for_gpus(model: Path, venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.parent.mkdir(parents=True)
    venv.touch()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    on_gpus = adapter(model)
    assert on_gpus.command(GPU)[0] == sys.executable
    assert "engine.python" in on_gpus.packages["sglang"]


def test_gpu_and_cpu_differ_in_what_concerns_them(model: Path) -> None:
    on_cpu, on_gpu = adapter(model).command(CPU), adapter(model).command(GPU)
    assert argument(on_cpu, "--device") == "cpu" and "--device" not in on_gpu
    assert argument(on_gpu, "--mem-fraction-static") == "0.4" and argument(on_cpu, "--mem-fraction-static") == "0.99"
    assert "--enable-deterministic-inference" in on_cpu and "--enable-deterministic-inference" not in on_gpu
    assert "--enable-deterministic-inference" in adapter(model, engine={"batch_invariant": True}).command(GPU)
    assert adapter().environment(CPU)["SGLANG_USE_CPU_ENGINE"] == "0"
    assert "SGLANG_USE_CPU_ENGINE" not in adapter().environment(GPU)


def test_the_cache_has_room_for_as_many_tokens_as_fit(model: Path) -> None:
    # Keys and values of 2 layers, 2 heads of 32 numbers: 2 x 2 x 2 x 32 x 2 bytes a token.
    assert argument(adapter(model).command(CPU), "--max-total-tokens") == str((1 << 30) // 512)
    three = adapter(model, model={"dtype": "float32"}, engine={"kv_cache_gib": 3})
    assert argument(three.command(GPU), "--max-total-tokens") == str((3 << 30) // 1024)
    assert "--max-total-tokens" not in adapter(model).command(GPU)


def test_the_longest_sequence_fits(model: Path) -> None:
    assert argument(adapter(model).command(CPU), "--context-length") == str(2048 + 20_480 + 8)


def test_code_of_a_checkpoint_runs_only_where_the_config_says_so(model: Path) -> None:
    assert "--trust-remote-code" not in adapter(model).command(CPU)
    assert "--trust-remote-code" in adapter(model, model={"trust_remote_code": True}).command(CPU)


def test_extra_arguments_come_last(model: Path) -> None:
    command = adapter(model, engine={"extra_args": ["--log-level", "info"]}).command(CPU)
    assert command[-2:] == ["--log-level", "info"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"engine": {"tensor_parallel": 3}}, r"engine.tensor_parallel\(3\) .*num_attention_heads\(4\)"),
        ({"engine": {"tensor_parallel": 2}}, r"engine.tensor_parallel\(2\): on CPU, engine.kind=sglang"),
        ({"rollout": {"top_p": 0.9}}, r"rollout.top_p\(0.9\).*engine.kind=sglang"),
    ],
)
def test_what_it_cannot_do_is_refused(sections: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match=message):
        adapter(**sections).check(MODEL)
    for verify in ("full", "checksums", "off"):
        adapter(eval={"data": "held_out.jsonl", "top_p": 0.9}, weights={"verify": verify}).check(MODEL)


Routes = dict[str, Callable[[web.Request], Awaitable[web.Response]]]


def ask(tmp_path: Path, routes: Routes, work: Callable[[Engine], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        app = web.Application()
        for path, answer in routes.items():
            app.router.add_route("*", path, answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server = StartedServer(
            "engine 3", [sys.executable, "-c", "input()"], os.environ, tmp_path / "log", lambda: True
        )
        engine = adapter().connect(server, replace(CPU, port=runner.addresses[0][1]))
        try:
            return await work(engine)
        finally:
            await engine.close()
            server.close()
            await runner.cleanup()

    return asyncio.run(main())


class Books:
    """A stand-in for SGLang's server that writes down what it is asked. `answers` has what it does not say itself."""

    def __init__(self, **answers: Any) -> None:
        self.asked: list[tuple[str, Any]] = []
        self._answers = {"model_info": {"weight_version": "6"}, **answers}

    @property
    def routes(self) -> Routes:
        changes = ("init_weights_update_group", "begin_weight_update", "update_weights_from_distributed")
        others = ("end_weight_update", "update_weight_version", "flush_cache", "model_info")
        pauses = ("pause_generation", "continue_generation", "release_memory_occupation", "resume_memory_occupation")
        return {f"/{name}": self._answer for name in (*changes, *others, *pauses)}

    async def _answer(self, request: web.Request) -> web.Response:
        name = request.path[1:]
        self.asked.append((name, await request.json() if request.can_read_body else None))
        answer = self._answers.get(name, {"success": True, "message": "done"})
        return answer if isinstance(answer, web.Response) else web.json_response(answer)


INVENTORY = {"names": ["a"], "dtypes": ["float32"], "shapes": [[2, 3]]}


async def push(engine: Engine) -> None:
    place = {"host": "::1", "port": 5, "rank_offset": 2, "world_size": 4, "timeout_seconds": 7.0}
    await engine.join_group({**place, "inventory": INVENTORY})
    await engine.begin_transfer()
    await engine.receive({"tensors": [0], **INVENTORY, "checksums": [-1]})
    await engine.finish_transfer(6)


def test_a_push_keeps_to_the_order_that_sglang_wants(tmp_path: Path) -> None:
    books = Books()

    async def work(engine: Engine) -> int:
        await push(engine)
        return engine.version

    assert ask(tmp_path, books.routes, work) == 6
    assert [name for name, _ in books.asked] == [
        *("init_weights_update_group", "pause_generation", "begin_weight_update", "update_weights_from_distributed"),
        *("end_weight_update", "flush_cache", "update_weight_version", "model_info", "continue_generation"),
    ]
    asked = dict(books.asked)
    more = json.loads(asked["init_weights_update_group"].pop("backend"))
    assert more == {"timeout_seconds": 7.0, "inventory": INVENTORY}
    assert asked["init_weights_update_group"] == {
        "master_address": "::1",
        "master_port": 5,
        "rank_offset": 2,
        "world_size": 4,
        "group_name": "weights",
    }
    bucket = json.loads(asked["update_weights_from_distributed"].pop("load_format"))
    assert bucket == {"tensors": [0], "checksums": [-1]}
    assert asked["update_weights_from_distributed"] == {
        "names": [],
        "dtypes": [],
        "shapes": [],
        "group_name": "weights",
        "flush_cache": False,
    }
    assert asked["update_weight_version"] == {"new_version": "6", "abort_all_requests": False}


def test_a_push_to_an_engine_that_sleeps_lets_it_go_on_once_it_has_a_cache(tmp_path: Path) -> None:
    books = Books()

    async def work(engine: Engine) -> None:
        for _ in range(2):
            await engine.sleep()
        for _ in range(2):
            await engine.wake(WEIGHTS)  # SGLang ends where it is to resume what it has not released
        await engine.begin_transfer()
        await engine.finish_transfer(6)
        await engine.wake(WEIGHTS, KV_CACHE)

    ask(tmp_path, books.routes, work)
    assert [name for name, _ in books.asked] == [
        *("pause_generation", "release_memory_occupation", "resume_memory_occupation", "begin_weight_update"),
        *("end_weight_update", "flush_cache", "update_weight_version", "model_info"),
        *("resume_memory_occupation", "continue_generation"),
    ]
    tags = [body["tags"] for name, body in books.asked if name.endswith("memory_occupation")]
    assert tags == [["kv_cache", "weights"], ["weights"], ["kv_cache"]]


def test_memory_is_given_up_on_gpus_where_it_can_be(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--enable-memory-saver" in adapter(model).command(replace(GPU, sleeps=True))
    assert "--enable-memory-saver" not in adapter(model).command(GPU)
    assert "--enable-memory-saver" not in adapter(model).command(replace(CPU, sleeps=True))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert "torch_memory_saver" in adapter(model, engine={"placement": "colocated"}).packages
    assert "torch_memory_saver" not in adapter(model).packages


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"init_weights_update_group": {"success": False, "message": "too late"}}, "init_weights_.*: too late"),
        ({"begin_weight_update": {"success": False, "message": "open already"}}, "begin_.*: open already"),
        ({"update_weights_from_distributed": {"success": False, "message": "no such"}}, "distributed: no such"),
        ({"end_weight_update": {"success": False, "message": "not open"}}, "end_weight_update: not open"),
        ({"begin_weight_update": {"message": "?"}}, "begin_weight_update: cannot read the answer .*'success'"),
        ({"flush_cache": web.Response(status=400, text="busy")}, "flush_cache: HTTP 400: busy"),
        ({"model_info": {"weight_version": "5"}}, "holds weights of version '5' after a transfer of version 6"),
        ({"model_info": {}}, "model_info: cannot read the answer"),
    ],
)
def test_what_sglang_did_not_do_is_an_error(tmp_path: Path, answers: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=f"engine 3.*{message}"):
        ask(tmp_path, Books(**answers).routes, push)


@pytest.mark.parametrize("success", [True, False])
def test_a_push_that_another_run_left_open_is_ended(tmp_path: Path, success: bool) -> None:
    books = Books(end_weight_update={"success": success, "message": "not open"})
    ask(tmp_path, books.routes, lambda engine: engine.reset())
    assert [name for name, _ in books.asked] == ["end_weight_update", "continue_generation"]


def test_responses_are_read_as_the_endpoint_writes_them(tmp_path: Path) -> None:
    written = completion([9, 2], [-0.5, -0.25], versions=[VersionSpan(3, 0, 2)])

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=encode([written]))

    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=4, stop_token_ids=(2,))
    prompt = Prompt("p", (3, 4), "", "")
    (read,) = ask(tmp_path, {GENERATE: answer}, lambda engine: engine.generate(prompt, sampling, 1))
    assert (read.token_ids.tolist(), read.logprobs.tolist()) == ([9, 2], [-0.5, -0.25])
    assert read.versions == (VersionSpan(3, 0, 2),)
