"""An engine that answers with its number, in a process of its own."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import Any

from dapo_megatron.config import Config
from dapo_megatron.rollout.about import About, needed
from dapo_megatron.rollout.adapter import EngineAdapter
from dapo_megatron.rollout.client import Client
from dapo_megatron.rollout.engine import KV_CACHE, WEIGHTS, Engine, Progress, Sampling
from dapo_megatron.rollout.place import Place
from dapo_megatron.rollout.server import UNKNOWN, Server
from dapo_megatron.types import Completion, Prompt, VersionSpan
from tests.helpers.completions import written

SERVER = """
import http.server, json, os, sys

class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.headers["Authorization"] == "Bearer " + os.environ["DAPO_MEGATRON_ENGINE_TOKEN"]
        self.send_response(200 if known or self.path == "/up" else 401)
        self.end_headers()
        greeting = json.dumps([int(sys.argv[2]), os.environ["GREETING"]])
        self.wfile.write((os.environ["ABOUT"] if self.path == "/about" else greeting).encode())

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
"""
"""A server that answers with its number and a variable, those who have its token."""


class Greeter(EngineAdapter):
    packages = {}
    health = "/up"

    def __init__(self, config: Config) -> None:
        self.greeting = "hello"
        self._config = config

    def check(self, hf_config: Any) -> None:
        pass

    def command(self, place: Place) -> list[str]:
        return [sys.executable, "-c", SERVER, str(place.port), str(place.index)]

    def environment(self, place: Place) -> dict[str, str]:
        about = asdict(needed(self._config, self._config.engine.kind)) if self._config.model.path.is_dir() else None
        return {"GREETING": self.greeting, "ABOUT": json.dumps(about)}

    def connect(self, server: Server, place: Place) -> Engine:
        return GreeterEngine(Client(server, place.url))


class GreeterEngine:
    workers = 1
    keeps = False

    def __init__(self, http: Client) -> None:
        self.name, self.http, self.version = http.name, http, http.server.version
        self.awake: tuple[str, ...] = (WEIGHTS, KV_CACHE)

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
        number, greeting = await self.http.call("GET", "/")
        answer = written(f"{greeting} from {number}")
        return [replace(answer, versions=(VersionSpan(self.wrote(), 0, answer.length),))] * n

    def wrote(self) -> int:
        return self.version

    async def progress(self) -> Progress:
        await self.http.call("GET", "/")
        return Progress(0, 0)

    async def about(self) -> About:
        return About(**await self.http.call("GET", "/about"))

    async def reset(self) -> None:
        await self.http.call("GET", "/")
        self.version = UNKNOWN

    async def join_group(self, info: dict[str, Any]) -> None: ...

    async def begin_transfer(self) -> None: ...

    async def receive(self, info: dict[str, Any]) -> None: ...

    async def finish_transfer(self, version: int) -> None:
        self.version = version

    async def sleep(self) -> None:
        await self.http.call("GET", "/")
        self.awake = ()

    async def wake(self, *tags: str) -> None:
        await self.http.call("GET", "/")
        self.awake = tuple({*self.awake, *tags})

    async def close(self) -> None:
        await self.http.close()
