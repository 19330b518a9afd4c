from __future__ import annotations

import os
import sys
import threading
import time
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import psutil
import pytest

from dapo_megatron.errors import EngineError
from dapo_megatron.rollout.ports import reserve_port
from dapo_megatron.rollout.server import StartedServer, answers

HTTP = "import http.server; http.server.test(http.server.SimpleHTTPRequestHandler, port={port}, bind='127.0.0.1')"


def start(code: str, log: Path, url: str = "http://127.0.0.1:9") -> StartedServer:
    return StartedServer("engine 0", [sys.executable, "-c", code], os.environ, log, answers(url))


def guards() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "dapo_megatron.rollout.guard" in child.cmdline()]


def test_a_server_that_answers_is_ready_and_close_frees_its_port(tmp_path: Path) -> None:
    reserved = reserve_port("127.0.0.1")
    port = reserved.getsockname()[1]
    server = start(HTTP.format(port=port), tmp_path / "log", f"http://127.0.0.1:{port}")
    server.wait_ready(20)
    reserved.close()
    server.check()
    (guard,) = guards()
    family = [guard, *guard.children(recursive=True)]
    server.close()
    server.close()
    assert not server.alive
    assert not [process for process in family if process.is_running()]
    reserve_port("127.0.0.1", port).close()


def test_a_command_that_ends_at_once_shows_its_last_words(tmp_path: Path) -> None:
    server = start("for i in range(50): print('line', i)\nraise SystemExit(9)", tmp_path / "new" / "engine0.log")
    with pytest.raises(EngineError) as failure:
        server.wait_ready(20)
    message = str(failure.value)
    assert "engine 0 ended with exit status 9" in message
    assert "line 49" in message
    assert "line 29" not in message
    assert str(tmp_path / "new" / "engine0.log") in message
    server.close()


def test_a_server_that_never_answers_is_ended(tmp_path: Path) -> None:
    server = start("import time; print('busy', flush=True); time.sleep(100)", tmp_path / "log")
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"did not answer within 1.5 s[\s\S]*busy"):
        server.wait_ready(1.5)
    assert time.monotonic() - started < 5
    assert not server.alive


def test_a_death_after_the_start_is_noticed(tmp_path: Path) -> None:
    with reserve_port("127.0.0.1") as reserved:
        port = reserved.getsockname()[1]
        server = start(HTTP.format(port=port), tmp_path / "log", f"http://127.0.0.1:{port}")
        server.wait_ready(20)
    (guard,) = guards()
    (child,) = guard.children()
    child.kill()
    deadline = time.monotonic() + 5
    while server.alive and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(EngineError, match=r"exit status 137 \(signal 9\)"):
        server.check()
    server.close()


def test_engines_are_asked_directly_where_a_proxy_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert answers(f"http://127.0.0.1:{server.server_port}/")()
        finally:
            server.shutdown()
