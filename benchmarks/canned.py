"""Stands in for an engine: a server that answers at once with responses that were not sampled.

    python -m benchmarks.canned HOST PORT

Lengths are lognormal with mean 3,000 and sigma 0.8 (median 2,180, one in a hundred above 14,000), cut at 20,480, and
depend on the prompt alone. Every other response to a prompt ends with the right answer.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
from itertools import accumulate
from typing import Any

from aiohttp import web
from transformers import PreTrainedTokenizerFast

from dapo_megatron.rollout.adapters import vllm
from dapo_megatron.rollout.place import Place

MEAN, SIGMA, CAP = 3_000, 0.8, 20_480
VOCABULARY = 151_643
END, RIGHT, WRONG = "<end>", "34", "35"
_FIRST = [END, "Ċ", "Answer", ":", f"Ġ{RIGHT}", f"Ġ{WRONG}"]
_AT_ONCE = 4
"""Answers that are on their way at a time: an engine's come one after the other."""


class Adapter(vllm.Adapter):
    """Starts this server in vLLM's place; the client is vLLM's."""

    def check(self, hf_config: Any) -> None: ...

    def command(self, place: Place) -> list[str]:
        return [sys.executable, "-m", "benchmarks.canned", place.host, str(place.port)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer with as many tokens as Qwen2.5's, of six characters each."""
    from tokenizers import Tokenizer, decoders, models

    words = [f"Ġ{''.join(chr(97 + number // 26**place % 26) for place in range(5))}" for number in range(VOCABULARY)]
    vocabulary = {token: index for index, token in enumerate([*_FIRST, *words[len(_FIRST) :]])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)


def lengths(prompt: list[int], n: int) -> list[int]:
    """Return how many tokens each of the n responses to a prompt has."""
    rng = random.Random(str(prompt))
    mu = math.log(MEAN) - SIGMA**2 / 2
    return [min(CAP, max(len(_ending(0)), round(rng.lognormvariate(mu, SIGMA)))) for _ in range(n)]


def _ending(index: int) -> list[int]:
    return [1, 2, 3, 4 + index % 2, 0]


class Answers:
    """Makes answers out of one long response and its text, which are there before the first request."""

    def __init__(self) -> None:
        rng = random.Random(0)
        self._tokens = [rng.randrange(len(_FIRST), VOCABULARY) for _ in range(CAP)]
        ids = [f"{token}," for token in self._tokens]
        entries = [_entry(token, -rng.expovariate(3)) + "," for token in self._tokens]
        self._ids, self._entries = "".join(ids), "".join(entries)
        self._id_ends = [0, *accumulate(map(len, ids))]
        self._entry_ends = [0, *accumulate(map(len, entries))]

    def answer(self, prompt: list[int], n: int) -> bytes:
        """Return what vLLM's /inference/v1/generate answers."""
        choices = ",".join(self._choice(index, length) for index, length in enumerate(lengths(prompt, n)))
        return f'{{"request_id":"r","choices":[{choices}]}}'.encode()

    def _choice(self, index: int, length: int) -> str:
        ending = _ending(index)
        body = length - len(ending)
        ids = self._ids[: self._id_ends[body]] + ",".join(map(str, ending))
        entries = self._entries[: self._entry_ends[body]] + ",".join(_entry(token, -0.25) for token in ending)
        return (
            f'{{"index":{index},"finish_reason":"{"length" if length == CAP else "stop"}","token_ids":[{ids}],'
            f'"logprobs":{{"content":[{entries}]}},"weight_versions":[{{"version":"default","start":0,"end":{length}}}]}}'
        )


def _entry(token: int, logprob: float) -> str:
    return f'{{"token_id":{token},"logprob":{logprob!r},"rank":1,"top_logprobs":[]}}'


def main(host: str, port: int) -> None:
    answers, turn = Answers(), asyncio.Semaphore(_AT_ONCE)

    async def generate(request: web.Request) -> web.StreamResponse:
        asked = json.loads(await request.read())
        async with turn:
            response = web.Response(
                body=answers.answer(asked["token_ids"], asked["sampling_params"]["n"]), content_type="application/json"
            )
            await response.prepare(request)
            await response.write_eof()
            return response

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/inference/v1/generate", generate)
    app.router.add_get("/health", health)
    web.run_app(app, host=host, port=port, print=None, access_log=None)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
