"""Who gets through to a server: called as ASGI servers do."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dapo_megatron.rollout.answer import ABOUT, GENERATE, HEALTH, PROGRESS
from dapo_megatron.rollout.endpoints.asgi import Message, Middleware, Receive, Send
from dapo_megatron.rollout.token import TOKEN, authorization, make_token

OWN = "s3cret-of-this-engine"


class Endpoint(Middleware):
    def client(self, scope: Message) -> Any:
        return None

    async def generate(self, client: Any, request: dict[str, Any]) -> bytes:
        return b"generated"

    def progress(self, client: Any) -> dict[str, int]:
        return {"tokens": 0, "finished": 0}


async def behind(scope: Message, receive: Receive, send: Send) -> None:
    """The server's own application, which lets everybody in."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"from behind"})


def ask(scope: Message) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(Endpoint(behind)(scope, receive, send))
    return sent


def request(method: str, path: str, *shown: str) -> Message:
    headers = [(b"host", b"engine"), *((b"authorization", value.encode()) for value in shown)]
    return {"type": "http", "method": method, "path": path, "headers": headers}


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, OWN)


WRONG = [
    (),
    ("",),
    ("Bearer",),
    ("Bearer ",),
    (f"Basic {OWN}",),
    (OWN,),
    (authorization(OWN[:-1]),),
    (authorization(OWN + "x"),),
    (authorization(make_token()),),
    (authorization("wrong"), authorization(OWN)),
]


@pytest.mark.parametrize("shown", WRONG)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(
            ("POST", GENERATE),
            ("GET", PROGRESS),
            ("POST", "/update_weights"),
            ("POST", "/pause"),
            ("GET", "/v1/models"),
            ("GET", ABOUT),
        ),
        *(("POST", HEALTH), ("GET", HEALTH + "/"), ("GET", "/"), ("OPTIONS", "/pause"), ("GET", "/no/such/path")),
    ],
)
def test_without_the_token_nothing_gets_through(method: str, path: str, shown: tuple[str, ...]) -> None:
    start, body = ask(request(method, path, *shown))
    assert (start["status"], body["body"]) == (
        401,
        f"the token of this engine ({TOKEN}) is missing, or another".encode(),
    )


def test_with_the_token_everything_does() -> None:
    shown = authorization(OWN)
    assert ask(request("POST", "/update_weights", shown))[1]["body"] == b"from behind"
    assert ask(request("GET", PROGRESS, shown))[1]["body"] == b'{"tokens": 0, "finished": 0}'
    assert ask(request("GET", HEALTH))[1]["body"] == b"from behind", "whoever waits for an engine may ask"
    assert ask({"type": "lifespan"})[1]["body"] == b"from behind", "comes from the server itself"


@pytest.mark.parametrize("path", ["/v1/realtime", HEALTH])
def test_a_websocket_is_closed(path: str) -> None:
    assert ask({"type": "websocket", "path": path, "headers": []}) == [{"type": "websocket.close", "code": 1008}]


def test_a_server_that_was_told_no_token_serves_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN)
    with pytest.raises(KeyError, match=TOKEN):
        Endpoint(behind)
