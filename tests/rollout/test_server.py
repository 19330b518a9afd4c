from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import psutil
import pytest

from dapo_megatron.config_file import parse
from dapo_megatron.errors import EngineError
from dapo_megatron.rollout.about import KIND
from dapo_megatron.rollout.life import start_server
from dapo_megatron.rollout.place import Place, place
from dapo_megatron.rollout.ports import reserve_port
from dapo_megatron.rollout.server import StartedServer, answers
from tests.helpers.checkpoint import values
from tests.helpers.greeter import Greeter

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


@pytest.mark.parametrize(
    ("sends", "says"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", r"what answers there is no HTTP \(BadStatusLine"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "HTTP 404: something else than an engine answers there"),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", None),
        (b"", None),
    ],
)
def test_what_is_no_engine_is_not_waited_for(sends: bytes, says: str | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(sends)

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/health"
        if says is None:
            assert not answers(url)()
        else:
            with pytest.raises(EngineError, match=f"^{re.escape(url)}: {says}"):
                answers(url)()


def test_a_server_is_told_as_what_kind_it_is_started(tmp_path: Path) -> None:
    class Adapter(Greeter):
        def command(self, place: Place) -> list[str]:
            return [sys.executable, "-c", f"import os; print('kind', os.environ[{KIND!r}])"]

    config = parse(values(tmp_path) | {"engine": {"kind": "tests.helpers.greeter:Greeter"}})
    where = place(config, 0, 1, ranks=0)
    server = start_server(config, Adapter(config), where, tmp_path / "log", None, "engine 0")
    with pytest.raises(EngineError, match=r"kind tests\.helpers\.greeter:Greeter"):
        server.wait_ready(20)
    server.close()
