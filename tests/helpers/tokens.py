"""Asks a real engine for everything that it has a path for, without its token."""

from __future__ import annotations

from typing import Any

import aiohttp
import psutil

from dapo_megatron.rollout.answer import ABOUT, GENERATE, HEALTH, PROGRESS
from dapo_megatron.rollout.client import Client
from dapo_megatron.rollout.engines import Engines


def assert_closed(engines: Engines, client: Client, control: set[str]) -> None:
    """No path is open, those of `control` among them, and the token is in no command line and not in the log."""
    token = client.server.token
    paths: dict[str, Any] = engines.run(client.call("GET", "/openapi.json"))["paths"]
    assert paths.keys() >= control
    asked = [(method, path) for path, methods in paths.items() for method in methods if path != HEALTH]
    asked += [("post", GENERATE), ("get", PROGRESS), ("get", ABOUT), ("get", "/metrics"), ("get", "/docs")]

    async def statuses(*headers: tuple[str, str]) -> set[int]:
        async with aiohttp.ClientSession(client.url, headers=headers) as session:
            return {(await session.request(method, path, json={})).status for method, path in asked}

    for shown in ([], [("Authorization", "Bearer wrong")], [("Authorization", token)]):
        assert engines.run(statuses(*shown)) == {401}

    (guard,) = [p for p in psutil.Process().children() if "dapo_megatron.rollout.guard" in p.cmdline()]
    words = [word for process in [guard, *guard.children(recursive=True)] for word in process.cmdline()]
    assert words and not [text for text in (*words, client.server.describe()) if token in text]
