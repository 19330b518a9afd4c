"""Failures of a request, with a stand-in server and a real process that lives or dies."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from dapo_megatron.errors import EngineError, RefusedError
from dapo_megatron.rollout.client import Client
from dapo_megatron.rollout.server import StartedServer

LIVES = "input()"


def ask(
    log: Path,
    answer: Callable[[web.Request], Awaitable[web.Response]],
    process: str = LIVES,
    answer_seconds: float | None = None,
    **changes: Any,
) -> Any:
    """What `/ask` answers an engine whose process is `process`."""

    async def main() -> Any:
        app = web.Application()
        app.router.add_post("/ask", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server = StartedServer("engine 3", [sys.executable, "-c", process], os.environ, log, lambda: True)
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        client = Client(server, url, answer_seconds=answer_seconds)
        try:
            return await client.call("POST", **{"path": "/ask", "body": {}, "what": "asking"} | changes)
        finally:
            await client.close()
            server.close()
            await runner.cleanup()

    return asyncio.run(main())


def answering(text: str, status: int = 200) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=text, status=status, content_type="text/html")

    return answer


def test_json_there_and_back(tmp_path: Path) -> None:
    async def echo(request: web.Request) -> web.Response:
        return web.json_response({"got": await request.json()})

    assert ask(tmp_path / "log", echo, body=[1]) == {"got": [1]}
    assert ask(tmp_path / "log", answering("")) is None


@pytest.mark.parametrize("status", [302, 307])
def test_nobody_is_asked_instead(tmp_path: Path, status: int) -> None:
    """They would see the token, or prompts and weights."""

    async def elsewhere(request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Location": "/instead"})

    with pytest.raises(RefusedError, match=f"asking: HTTP {status}"):
        ask(tmp_path / "log", elsewhere)


def test_every_request_shows_the_token_of_the_server(tmp_path: Path) -> None:
    """Which is in the environment of its processes, and nowhere else."""

    async def shown(request: web.Request) -> web.Response:
        return web.json_response(request.headers["Authorization"])

    process = "import os; print(len(os.environ['DAPO_MEGATRON_ENGINE_TOKEN'])); input()"
    first, second = (ask(tmp_path / "log", shown, process) for _ in range(2))
    assert first != second and all(answer.startswith("Bearer ") and len(answer) > 40 for answer in (first, second))

    async def refused(request: web.Request) -> web.Response:
        return web.Response(text="the token is missing, or another", status=401)

    with pytest.raises(RefusedError, match="HTTP 401: the token") as error:
        ask(tmp_path / "log", refused)
    assert "Bearer" not in str(error.value)


def test_proxies_are_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert ask(tmp_path / "log", answering("1")) == 1


def test_an_unknown_path_may_have_a_default(tmp_path: Path) -> None:
    assert ask(tmp_path / "log", answering("1"), path="/other", missing={}) == {}
    with pytest.raises(EngineError, match="engine 3, asking: HTTP 404"):
        ask(tmp_path / "log", answering("1"), path="/other")


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ("<html>\x1b[2J gateway", r"JSONDecodeError: .*\): b'<html>\\x1b\[2J gateway'$"),
        ("[" * 10_000, r"\[ \.\.\.$"),
    ],
)
def test_an_answer_that_is_not_json_is_an_error_and_its_start_is_shown(tmp_path: Path, body: str, shown: str) -> None:
    with pytest.raises(EngineError, match=f"engine 3, asking: cannot read the answer .*{shown}") as failure:
        ask(tmp_path / "log", answering(body))
    assert len(str(failure.value)) < 1000
    assert str(failure.value).isprintable()


def test_an_engine_that_does_not_answer_in_time_is_an_error(tmp_path: Path) -> None:
    async def never(request: web.Request) -> web.Response:
        await asyncio.sleep(3)
        return web.json_response({})

    with pytest.raises(EngineError, match=r"asking: no answer within 0.3 s \(engine.stall_seconds\)"):
        ask(tmp_path / "log", never, answer_seconds=0.3)


def test_a_failure_tells_how_the_process_ended(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"HTTP 500: no[\s\S]*ended with exit status 9[\s\S]*last words"):
        ask(tmp_path / "log", answering("no", 500), "print('last words'); raise SystemExit(9)")
    with pytest.raises(EngineError, match=r"HTTP 400: no[\s\S]*has not ended"):
        ask(tmp_path / "log", answering("no", 400))
