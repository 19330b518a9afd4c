"""What the endpoints in every kind of server have in common: ASGI, the token, errors, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict, replace
from typing import Any, ClassVar

from dapo_megatron.rollout.about import KIND, About
from dapo_megatron.rollout.answer import ABOUT, GENERATE, HEALTH, LEASE, PROGRESS
from dapo_megatron.rollout.lease import RUN, Lease, Tenant
from dapo_megatron.rollout.token import TOKEN, authorization

_RUN = RUN.lower().encode()
_CHARACTERS = 200
"""Of what a tenant says of itself."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Middleware:
    """Answers four paths and passes everything else on, all of it only to those who show the token.

    vLLM and SGLang have keys of their own (`--api-key`). vLLM's guards the paths of OpenAI's interface and leaves those
    that change weights open. So this one is before all others: whatever does not carry it is answered with status 401,
    and a websocket is closed. `GET HEALTH` needs none, and tells nothing.

    `POST GENERATE` takes JSON {"token_ids", "n", "temperature", "top_p", "max_tokens", "stop_token_ids", "seed"} and
    answers what `answer.encode` makes of the `n` responses. A client that goes away ends the request.

    `GET PROGRESS` answers JSON, the fields of `engine.Progress`; `GET ABOUT` those of `about.About`.

    `POST LEASE` takes JSON, the fields of `lease.Tenant`, and answers what `Lease.take` returns; `DELETE LEASE` gives
    the lease back of the run in the header RUN. While a run has it, whatever else comes without its header is answered
    with status 409.

    Failures are answered as text, with status 400 for what is `refused` and 500 for the rest.
    """

    refused: ClassVar[tuple[type[Exception], ...]] = (ValueError, TypeError, LookupError)
    """What is raised for a request that cannot be served."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        # Without one in the environment the server does not serve.
        self._authorization = authorization(os.environ[TOKEN]).encode()
        self._lease = Lease()

    def client(self, scope: Message) -> Any:
        """The engine's own Python API, which the server's application `scope["app"]` speaks to."""
        raise NotImplementedError

    async def generate(self, client: Any, request: dict[str, Any]) -> bytes:
        raise NotImplementedError

    def progress(self, client: Any) -> dict[str, int]:
        raise NotImplementedError

    def about(self, client: Any) -> About:
        raise NotImplementedError

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope.get("path")
        if not self._may_pass(scope):
            await _refuse(scope, send, 401, f"the token of this engine ({TOKEN}) is missing, or another")
            return
        refusal = None if _is_free(scope) else self._lease.refusal(_run(scope))
        if refusal and path not in (PROGRESS, ABOUT, LEASE):
            await _refuse(scope, send, 409, refusal)
            return
        if path not in (GENERATE, PROGRESS, ABOUT, LEASE):
            await self._app(scope, receive, send)
            return
        client = self.client(scope)
        try:
            if path == LEASE:
                content = json.dumps(self._leased(scope, await _body(receive))).encode()
            elif path == PROGRESS:
                content = json.dumps(self.progress(client)).encode()
            elif path == ABOUT:
                about = self.about(client)
                content = json.dumps(asdict(replace(about, kind=os.environ.get(KIND) or about.kind))).encode()
            else:
                work = asyncio.ensure_future(self.generate(client, json.loads(await _body(receive))))
                content = await _unless_gone(work, receive)
                if content is None:
                    return
            status = 200
        except self.refused as error:
            status, content = 400, f"{type(error).__name__}: {error}".encode()
        except Exception as error:  # the client hears of whatever there is
            status, content = 500, f"{type(error).__name__}: {error}".encode()
        await _answer(send, status, content)

    def _may_pass(self, scope: Message) -> bool:
        if _is_free(scope):
            return True
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(shown) == 1 and secrets.compare_digest(shown[0], self._authorization)

    def _leased(self, scope: Message, body: bytes) -> dict[str, Any] | None:
        if scope["method"] == "DELETE":
            return self._lease.give_back(_run(scope))
        asked = json.loads(body)
        return self._lease.take(Tenant(*(str(asked[key])[:_CHARACTERS] for key in ("run", "owner", "url"))))


def _is_free(scope: Message) -> bool:
    """Whether it is for everybody."""
    return scope["type"] == "lifespan" or (scope.get("method"), scope.get("path")) == ("GET", HEALTH)


def _run(scope: Message) -> str:
    """Which run asks; "" where it does not say so."""
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == _RUN), "")


async def _refuse(scope: Message, send: Send, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await _answer(send, status, reason.encode())


async def _answer(send: Send, status: int, content: bytes) -> None:
    headers = [(b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def check_tokens(request: dict[str, Any], vocabulary: int, context: int, limited_by: str) -> None:
    """Refuse tokens that the model has not, and more of them than there is room for.

    Args:
        limited_by: the argument of the server that says how much room there is.

    Raises:
        ValueError, TypeError: says which.
    """
    token_ids, max_tokens = request["token_ids"], request["max_tokens"]
    if not all(0 <= token < vocabulary for token in token_ids):
        raise ValueError(f"token_ids must be from 0 to {vocabulary - 1}, the model's last")
    if (length := len(token_ids) + max_tokens) > context:
        raise ValueError(
            f"token_ids({len(token_ids)}) + max_tokens({max_tokens}) = {length} is more than {limited_by}({context})"
        )


def version(name: str) -> int:
    """The number of weights that an engine has under a name. Those that it loaded itself are "default"."""
    return 0 if name == "default" else int(name)


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


async def _unless_gone(work: asyncio.Future[bytes], receive: Receive) -> bytes | None:
    """The result of `work`, or None where the client goes away first, which cancels it."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    watching = asyncio.ensure_future(gone())
    try:
        await asyncio.wait([work, watching], return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        watching.cancel()
        work.cancel()
