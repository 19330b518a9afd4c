"""`dapo-megatron engines` as a person starts it, with engines that are quick to start."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from dapo_megatron import cli
from dapo_megatron.rollout.token import TOKEN, make_token
from tests.helpers.checkpoint import values


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    engine = {"kind": "tests.helpers.greeter:Greeter", "count": 2, "stall_seconds": 5}
    path.write_text(yaml.safe_dump(values(tmp_path) | {"engine": engine}))
    return path


Started = tuple[subprocess.Popen[str], list[str], list[psutil.Process]]


@pytest.fixture
def start(config: Path) -> Iterator[Callable[..., Started]]:
    """Starts the command; gives it, the URLs that it prints, and its processes."""
    begun: list[subprocess.Popen[str]] = []

    def begin(*overrides: str) -> Started:
        command = [sys.executable, "-m", "dapo_megatron", "engines", str(config), *overrides]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        begun.append(process)
        assert process.stdout and process.stderr
        urls = [process.stdout.readline().strip() for _ in range(2)]
        assert all(urls), process.stderr.read()
        return process, urls, psutil.Process(process.pid).children(recursive=True)

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


def status(url: str, token: str | None = None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_engines_are_there_until_they_are_ended(
    config: Path, start: Callable[..., Started], number: signal.Signals, code: int
) -> None:
    process, urls, family = start()
    file = config.parent / "runs/test-engines/token"
    token = file.read_text().strip()
    assert file.stat().st_mode & 0o777 == 0o600
    for url in urls:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        assert (status(url, token), status(url), status(url, make_token()), status(f"{url}/up")) == (200, 401, 401, 200)
    assert not [member for member in family if any(token in word for word in member.cmdline())]
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (code, "")
    shown = json.dumps(urls).replace(" ", "")
    assert f"engine.placement=external 'engine.urls={shown}'; the token is in {file}" in errors
    assert token not in errors and "Traceback" not in errors
    assert not psutil.wait_procs(family, timeout=10)[1]


@pytest.mark.slow
def test_when_one_dies_all_end_with_its_reason(start: Callable[..., Started]) -> None:
    process, _, family = start()
    servers = [member for member in family if "http.server" in " ".join(member.cmdline())]
    max(servers, key=psutil.Process.create_time).kill()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    log = rf"runs/test-engines/{re.escape(socket.gethostname())}-process{process.pid}/engine[01].log"
    assert re.search(rf"error: engine [01].*[\s\S]*the end of its log \S+{log}", errors)
    assert not psutil.wait_procs(family, timeout=10)[1]


@pytest.mark.slow
def test_the_config_of_the_run_will_do_and_a_given_token_is_not_written_down(
    config: Path, start: Callable[..., Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN, token := make_token())
    given = yaml.safe_load(config.read_text())
    given["engine"] |= {"placement": "external", "urls": ["http://10.0.0.2:1", "http://10.0.0.2:2"]}
    config.write_text(yaml.safe_dump(given))
    process, urls, _ = start()
    assert [status(url, token) for url in urls] == [200, 200]
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert f"the token is that of {TOKEN} in the environment" in errors and token not in errors
    written = [path for path in config.parent.rglob("*") if path.is_file()]
    assert not [path for path in written if token.encode() in path.read_bytes()]


def test_logs_that_cannot_be_written_are_input_that_cannot_work(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN, make_token())
    assert cli.main(["engines", str(config), "run.dir=/proc/x"]) == 2
    assert "run.dir: the engines' logs cannot be written to /proc/x/test-engines/" in capsys.readouterr().err


def test_every_address_is_none_to_be_found_at(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["engines", str(config), "engine.host=0.0.0.0"]) == 2
    assert "engine.host=0.0.0.0 is every address of this machine" in capsys.readouterr().err
    assert not (config.parent / "runs").exists()
