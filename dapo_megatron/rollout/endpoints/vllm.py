"""Runs inside vLLM's server, which is given `Endpoint` as `--middleware`.

The server's own answers are JSON of OpenAI's shape: about 150 bytes and several objects for every token, on both sides.
Here the answer is `rollout.answer`, made from what vLLM's Python API gives.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import numpy as np
from vllm import SamplingParams, exceptions
from vllm.inputs import tokens_input
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind

from dapo_megatron.rollout.answer import GENERATE, PROGRESS, encode
from dapo_megatron.types import Completion, FinishReason, VersionSpan

_REFUSED: Any = (ValueError, TypeError, LookupError, getattr(exceptions, "VLLMClientError", ValueError))
"""What is raised for a request that cannot be served. In 0.25 vLLM's own are ValueErrors."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Endpoint:
    """ASGI middleware that answers two paths and passes everything else on.

    `POST GENERATE` takes JSON {"token_ids", "n", "temperature", "top_p", "max_tokens", "stop_token_ids", "seed"} and
    answers what `answer.encode` makes of the `n` responses; their versions are missing where vLLM reports none (0.25).
    A client that goes away ends the request.

    `GET PROGRESS` answers JSON, the fields of `engine.Progress`.

    Failures are answered as text, with status 400 for what is asked and 500 for the rest.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._numbers = itertools.count()
        self._open: dict[str, int] = {}
        """Requests that are being served -> how many responses they want."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope.get("path")
        if path not in (GENERATE, PROGRESS):
            await self._app(scope, receive, send)
            return
        client = scope["app"].state.engine_client
        try:
            if path == PROGRESS:
                content = json.dumps(self._progress(client)).encode()
            else:
                work = asyncio.ensure_future(self._generate(client, json.loads(await _body(receive))))
                content = await _unless_gone(work, receive)
                if content is None:
                    return
            status = 200
        except _REFUSED as error:
            status, content = 400, f"{type(error).__name__}: {error}".encode()
        except Exception as error:  # the client hears of whatever there is
            status, content = 500, f"{type(error).__name__}: {error}".encode()
        headers = [(b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _progress(self, client: Any) -> dict[str, int]:
        """Look at vLLM's books: its own counters cost work for every token (`--disable-log-stats`)."""
        books = client.output_processor
        unfinished = books.external_req_ids
        return {
            "tokens": sum(state.detokenizer.num_output_tokens() for state in books.request_states.values()),
            "finished": sum(n - len(unfinished[name]) for name, n in self._open.items() if name in unfinished),
        }

    async def _generate(self, client: Any, request: dict[str, Any]) -> bytes:
        token_ids, n, max_tokens = request["token_ids"], request["n"], request["max_tokens"]
        config = client.model_config
        vocabulary = config.get_vocab_size()
        if not all(0 <= token < vocabulary for token in token_ids):
            raise ValueError(f"token_ids must be from 0 to {vocabulary - 1}, the model's last")
        if len(token_ids) + max_tokens > config.max_model_len:
            raise ValueError(
                f"token_ids({len(token_ids)}) + max_tokens({max_tokens}) = {len(token_ids) + max_tokens} is more than "
                f"--max-model-len({config.max_model_len})"
            )
        sampling = SamplingParams(
            n=n,
            temperature=request["temperature"],
            top_p=request["top_p"],
            max_tokens=max_tokens,
            stop_token_ids=request["stop_token_ids"],
            # Response k has the stream of seed + k.
            seed=request["seed"],
            # Otherwise the end tokens of the checkpoint's config would stop a response as well.
            ignore_eos=True,
            # The sampled token's own, no alternatives.
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        name = f"dapo-{next(self._numbers)}"
        self._open[name] = n
        try:
            # The only one: all responses, once the last is written.
            outputs: list[RequestOutput] = [o async for o in client.generate(tokens_input(token_ids), sampling, name)]
        finally:
            del self._open[name]
        return encode([_completion(output) for output in outputs[-1].outputs])


def _completion(output: CompletionOutput) -> Completion:
    spans = getattr(output, "weight_versions", None) or ()
    logprobs: Any = output.logprobs  # flat: one entry for each token, as no alternatives are asked for
    return Completion(
        token_ids=np.array(output.token_ids, np.int32),
        logprobs=np.array(logprobs.logprobs, np.float32),
        finish=FinishReason(output.finish_reason),
        versions=tuple(VersionSpan(_version(span.version), span.start, span.end) for span in spans),
    )


def _version(name: str) -> int:
    """vLLM calls the weights that it loaded itself "default"."""
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
