"""Who may use an engine: the rule with a clock of its own, and runs that ask a real server."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from dapo_megatron.config import Config
from dapo_megatron.config_file import parse
from dapo_megatron.errors import EngineError, RefusedError
from dapo_megatron.rollout import lease
from dapo_megatron.rollout.about import KIND, About, needed
from dapo_megatron.rollout.adapter import EngineAdapter
from dapo_megatron.rollout.answer import ABOUT, LEASE, encode
from dapo_megatron.rollout.client import Client
from dapo_megatron.rollout.endpoints.asgi import Message, Middleware
from dapo_megatron.rollout.engine import Sampling
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.rollout.http_engine import HttpEngine
from dapo_megatron.rollout.lease import LEASE_SECONDS, Hold, Lease, Tenant
from dapo_megatron.rollout.place import Place
from dapo_megatron.rollout.ports import reserve_port
from dapo_megatron.rollout.server import ServerElsewhere
from dapo_megatron.rollout.token import TOKEN, make_token
from dapo_megatron.types import Prompt
from tests.helpers.checkpoint import values
from tests.helpers.completions import read, written
from tests.rollout.endpoints.test_asgi import behind

MATH, CODE = Tenant("1a", "run math", "http://here"), Tenant("2b", "run code", "http://here")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_one_run_at_a_time_until_it_gives_the_lease_back() -> None:
    clock = Clock()
    held = Lease(clock)
    assert held.refusal("") is None and held.take(MATH) is None
    clock.now += 9
    assert held.take(CODE) == {"owner": "run math", "seconds": 9.0}
    assert held.take(MATH) is None and held.refusal("1a") is None
    for other in ("2b", ""):
        assert "in use by run math, and this request is not that run's" in str(held.refusal(other))
    held.give_back("2b")
    assert held.refusal("2b")
    held.give_back("1a")
    assert held.refusal("2b") is None and held.take(CODE) is None and held.refusal("1a")


def test_a_run_that_is_not_heard_from_loses_it_and_any_request_is_heard() -> None:
    clock = Clock()
    held = Lease(clock)
    held.take(MATH)
    clock.now += LEASE_SECONDS - 1
    assert held.refusal("1a") is None
    clock.now += LEASE_SECONDS - 1
    assert held.refusal("2b") and held.take(CODE)
    clock.now += 1
    assert held.refusal("2b") is None and held.take(CODE) is None
    assert "in use by run code" in str(held.refusal("1a")), "the run that comes back hears of it"


def test_a_run_that_finds_it_in_two_places_hears_of_that() -> None:
    held = Lease(Clock())
    elsewhere = replace(MATH, url="http://there")
    assert held.take(MATH) is None
    assert held.take(elsewhere) == {"owner": "run math", "seconds": 0.0, "url": "http://here"}
    assert held.take(MATH) is None, "the first place stays its place"
    held.give_back("1a")
    assert held.take(elsewhere) is None


class Answers(Middleware):
    """Of a server that has everything but a model."""

    serves: About

    def client(self, scope: Message) -> Any:
        return None

    def progress(self, client: Any) -> dict[str, int]:
        return {"tokens": 0, "finished": 0}

    def about(self, client: Any) -> About:
        return self.serves

    async def generate(self, client: Any, request: dict[str, Any]) -> bytes:
        return encode([replace(written("hello"), versions=())] * request["n"])


class Speaker(HttpEngine):
    async def reset(self) -> None:
        await self._transfer.fetch("POST", "/reset")

    async def finish_transfer(self, version: int) -> None:
        await self._transfer.fetch("POST", "/finish")
        self.version = version


class Adapter(EngineAdapter):
    packages: Mapping[str, str] = {}
    health = "/health"

    def __init__(self, config: Config) -> None: ...

    def connect(self, server: Any, place: Place) -> Any:
        clients = [Client(server, place.url) for _ in range(3)]
        return Speaker(generation=clients[0], transfer=clients[1], control=clients[2], workers=1)


class Engine:
    """A server with the lease before it, in a thread."""

    def __init__(self, token: str) -> None:
        port = reserve_port("127.0.0.1")
        self.token, self.url = token, f"http://127.0.0.1:{port.getsockname()[1]}"
        self.app = Answers(behind)
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_level="warning", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, args=([port],))
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def hold(self, tenant: Tenant) -> Hold:
        return Hold(f"engine 0 ({self.url})", self.token, replace(tenant, url=self.url))

    def ask(self, path: str, run: str) -> bytes | None:
        async def asked() -> bytes | None:
            server = ServerElsewhere("engine 0", self.url, self.token, lambda: True, run)
            client = Client(server, self.url)
            try:
                return await client.fetch("POST", path, {})
            finally:
                await client.close()

        return asyncio.run(asked())

    def end(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setenv(TOKEN, token := make_token())
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.05)
    running = Engine(token)
    yield running
    running.end()


def test_another_run_is_refused_as_soon_as_the_one_there_is_heard_from(engine: Engine) -> None:
    math, code = engine.hold(MATH), engine.hold(CODE)
    asyncio.run(math.take())
    assert engine.ask("/update_weights", "1a") == b"from behind"
    with pytest.raises(RefusedError, match=r"(?s)HTTP 409: in use by run math, and this request is not"):
        engine.ask("/update_weights", "2b")
    with pytest.raises(EngineError, match=r"engine 0 \(http.*\) is in use by run math, which was heard from 0 s ago"):
        asyncio.run(code.take())
    math.close()
    math.close()
    asyncio.run(code.take())
    assert engine.ask("/update_weights", "2b") == b"from behind"
    code.close()
    assert engine.ask("/update_weights", "") == b"from behind"


def test_the_token_goes_nowhere_else() -> None:
    seen: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(302)
            self.send_header("Location", "/instead")
            self.end_headers()

        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])

    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tenant = replace(MATH, url=f"http://127.0.0.1:{server.server_port}")
        hold = Hold("engine 0", make_token(), tenant)
        with pytest.raises(EngineError, match=r"engine 0, .*: HTTP 302"):
            asyncio.run(hold.take())
        server.shutdown()
    assert not seen


def test_the_lease_of_a_run_that_was_killed_is_waited_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.5)
    killed, following = engine.hold(MATH), engine.hold(CODE)
    monkeypatch.setattr(killed, "_keep", lambda: None)
    asyncio.run(killed.take())
    began = time.monotonic()
    asyncio.run(following.take())
    assert time.monotonic() - began > 0.3
    following.close()


def test_a_lease_is_kept_while_nothing_else_is_asked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.5)
    math = engine.hold(MATH)
    asyncio.run(math.take())
    time.sleep(1.0)
    with pytest.raises(RefusedError):
        engine.ask("/pause", "2b")
    math.close()


def test_what_an_engine_serves_and_whether_it_is_up_others_may_ask(engine: Engine) -> None:
    math = engine.hold(MATH)
    asyncio.run(math.take())
    engine.app.serves = About("vllm", "float32", "gloo", 1, 24, {})
    assert b'"sequence_tokens": 24' in (engine.ask(ABOUT, "2b") or b"")
    math.close()


def test_it_is_of_the_kind_that_it_was_started_as(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.app.serves = About("vllm", "float32", "gloo", 1, 24, {})
    assert b'"kind": "vllm"' in (engine.ask(ABOUT, "") or b"")
    monkeypatch.setenv(KIND, "mine:Adapter")
    assert b'"kind": "mine:Adapter"' in (engine.ask(ABOUT, "") or b"")


@pytest.mark.parametrize("body", [{}, [], {"run": "x"}, {"run": "x", "owner": "y"}])
def test_what_is_no_request_for_a_lease_is_refused(engine: Engine, body: Any) -> None:
    async def asked() -> None:
        client = Client(ServerElsewhere("engine 0", engine.url, engine.token, lambda: True), engine.url)
        try:
            await client.call("POST", LEASE, body)
        finally:
            await client.close()

    with pytest.raises(RefusedError, match="HTTP 400"):
        asyncio.run(asked())


def test_an_engine_that_is_away_is_no_lease(engine: Engine) -> None:
    engine.end()
    with pytest.raises(EngineError, match=r"engine 0 \(http.*/dapo_megatron/lease: "):
        asyncio.run(engine.hold(MATH).take())


def test_a_server_that_keeps_none_is_used_without(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    async def unknown(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    monkeypatch.setattr(Middleware, "__call__", lambda self, *how: unknown(*how))
    hold = engine.hold(MATH)
    asyncio.run(hold.take())
    hold.close()


def test_of_two_runs_one_has_the_engine(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, engine.token)
    given = values(tmp_path) | {"engine": {"placement": "external", "urls": [engine.url], "max_restarts": 0}}
    given["engine"]["kind"] = f"{__name__}:Adapter"
    configs = [parse({**given, "run": {**given["run"], "name": name}}) for name in ("math", "code")]
    engine.app.serves = needed(configs[0], configs[0].engine.kind)
    prompt, sampling = Prompt("p", (3, 4), "", ""), Sampling(1.0, 1.0, 4, ())

    def use(engines: Engines) -> str:
        engines.wait_ready()
        engines.expect(1)
        (one,) = engines
        engines.run(one.finish_transfer(1))
        (answer,) = engines.sample(engines.generate(prompt, sampling, 1))
        return read(answer.token_ids)

    with closing(Engines(configs[0], tmp_path, ranks=0)) as math:
        assert use(math) == "hello"
        with closing(Engines(configs[1], tmp_path, ranks=0)) as code:
            owner = rf"run math, process {os.getpid()} on {re.escape(socket.gethostname())}"
            with pytest.raises(EngineError, match=rf"engine 0 \(http.*\) is in use by {owner}, which was heard from"):
                use(code)
        assert use(math) == "hello"
    with closing(Engines(configs[1], tmp_path, ranks=0)) as code:
        assert use(code) == "hello"
        with pytest.raises(RefusedError, match="HTTP 409: in use by run code"):
            engine.ask("/finish", "1a")  # of a run that was silent, and whose lease another has


def test_an_engine_by_two_urls_counts_once(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, engine.token)
    urls = [engine.url, engine.url.replace("127.0.0.1", "localhost")]
    given = values(tmp_path) | {"engine": {"placement": "external", "urls": urls, "max_restarts": 0}}
    given["engine"]["kind"] = f"{__name__}:Adapter"
    config = parse(given)
    engine.app.serves = needed(config, config.engine.kind)
    with closing(Engines(config, tmp_path, ranks=0)) as engines:
        one, other = map(re.escape, urls)
        with pytest.raises(
            EngineError, match=rf"^engine \d \(({one}|{other})\) and ({one}|{other}) are one engine; .*urls$"
        ):
            engines.wait_ready()
