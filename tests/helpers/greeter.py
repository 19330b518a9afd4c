"""An engine that answers with its number, in a process of its own."""

from __future__ import annotations

import sys
from typing import Any

from dapo_megatron.config import Config
from dapo_megatron.rollout.adapter import EngineAdapter
from dapo_megatron.rollout.client import Client
from dapo_megatron.rollout.engine import Engine, Progress, Sampling
from dapo_megatron.rollout.place import Place
from dapo_megatron.rollout.server import Server
from dapo_megatron.types import Completion, Prompt
from tests.helpers.completions import written

SERVER = """
import http.server, json, os, sys

class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps([int(sys.argv[2]), os.environ["GREETING"]]).encode())

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
"""
"""A server that answers with its number and a variable."""


class Greeter(EngineAdapter):
    packages = {}
    health = "/up"

    def __init__(self, config: Config) -> None:
        self.greeting = "hello"

    def check(self, hf_config: Any) -> None:
        pass

    def command(self, place: Place) -> list[str]:
        return [sys.executable, "-c", SERVER, str(place.port), str(place.index)]

    def environment(self, place: Place) -> dict[str, str]:
        return {"GREETING": self.greeting}

    def connect(self, server: Server, place: Place) -> Engine:
        return GreeterEngine(Client(server, place.url))


class GreeterEngine:
    workers = 1

    def __init__(self, http: Client) -> None:
        self.name, self.http, self.version = http.name, http, 0

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
        number, greeting = await self.http.call("GET", "/")
        return [written(f"{greeting} from {number}")] * n

    async def progress(self) -> Progress:
        await self.http.call("GET", "/")
        return Progress(0, 0)

    async def join_group(self, info: dict[str, Any]) -> None: ...

    async def begin_transfer(self) -> None: ...

    async def receive(self, info: dict[str, Any]) -> None: ...

    async def finish_transfer(self, version: int) -> None:
        self.version = version

    async def close(self) -> None:
        await self.http.close()
