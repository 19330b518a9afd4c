"""Asks an engine over HTTP, and tells what became of its process where that fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp

from dapo_megatron.errors import EngineError, RefusedError
from dapo_megatron.rollout.lease import RUN
from dapo_megatron.rollout.server import Server
from dapo_megatron.rollout.token import authorization

_DEATH_SECONDS = 1.0
"""How long to wait, after a connection broke, for the process to turn out dead."""
_FAILURE_CHARACTERS = 2000
"""How much of an error's answer a message shows."""
_ANSWER_CHARACTERS = 500
"""How much a message shows of an answer that cannot be read."""


class Client:
    """Requests to one engine, all at once where they come at once. Proxies of the environment are not asked, nor
    whoever an answer names instead. Each shows the server's token, and which run asks.

    Args:
        server: the engine's processes.
        url: where it answers.
        answer_seconds: limit on one request; None for requests that may take as long as they do.
        limited_by: the key of the configuration that says so.

    Raises:
        EngineError: from `fetch`, `call` and `reading`, for whatever goes wrong; RefusedError, where the request is.
    """

    def __init__(
        self,
        server: Server,
        url: str,
        *,
        answer_seconds: float | None = None,
        limited_by: str = "engine.stall_seconds",
    ) -> None:
        self.name = server.name
        self.server, self.url = server, url
        self._answer_seconds, self._limited_by = answer_seconds, limited_by
        self._session: aiohttp.ClientSession | None = None

    async def fetch(
        self, method: str, path: str, body: Any = None, *, what: str | None = None, may_miss: bool = False
    ) -> bytes | None:
        """What the server answers.

        Args:
            body: what to send as JSON.
            what: what is being done, for messages; the path where it is not given.
            may_miss: the result is None for a path that the server does not know.
        """
        what = what or path
        if self._session is None:
            self._session = aiohttp.ClientSession(
                self.url,
                headers={"Authorization": authorization(self.server.token), RUN: self.server.run},
                # One connection per request: a kept one may be closed by the server just as we use it again.
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                timeout=aiohttp.ClientTimeout(total=self._answer_seconds),
            )
        try:
            async with self._session.request(method, path, json=body, allow_redirects=False) as response:
                if response.status == 404 and may_miss:
                    return None
                if response.status != 200:
                    failure = f"{what}: HTTP {response.status}: {(await response.text())[:_FAILURE_CHARACTERS]}"
                    if response.status < 500:
                        raise RefusedError(await self._describe(failure))
                    raise EngineError(await self._describe(failure, dying=True))
                return await response.read()
        except TimeoutError as error:
            failure = f"{what}: no answer within {self._answer_seconds:g} s ({self._limited_by})"
            raise EngineError(await self._describe(failure)) from error
        except aiohttp.ClientError as error:
            raise EngineError(await self._describe(f"{what}: {error or type(error).__name__}", dying=True)) from error

    async def call(
        self, method: str, path: str, body: Any = None, *, what: str | None = None, missing: Any = None
    ) -> Any:
        """The JSON that the server answers, None for an answer without content.

        Args:
            missing: where it is given, the result for a path that the server does not know.
        """
        content = await self.fetch(method, path, body, what=what, may_miss=missing is not None)
        if content is None:
            return missing
        with self.reading(content, what or path):
            return json.loads(content) if content else None

    @contextmanager
    def reading(self, answer: Any, what: str) -> Iterator[None]:
        """Turn whatever goes wrong while `answer` is taken apart into the engine's error."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            shown = repr(answer)  # spells control characters
            shown = shown if len(shown) <= _ANSWER_CHARACTERS else f"{shown[:_ANSWER_CHARACTERS]} ..."
            raise EngineError(
                f"{self.name}, {what}: cannot read the answer ({type(error).__name__}: {error}): {shown}"
            ) from error

    async def close(self) -> None:
        """Let go of the connections. Safe to call twice."""
        if self._session:
            await self._session.close()
            self._session = None

    async def _describe(self, failure: str, dying: bool = False) -> str:
        """`failure`, with the state of the process; when it is `dying`, that may take a moment to show."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + _DEATH_SECONDS
        while dying and self.server.alive and clock() < deadline:
            await asyncio.sleep(0.05)
        return f"{self.name}, {failure}\n{self.server.describe()}"
