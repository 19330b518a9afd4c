"""Stands in for an engine: a server that answers at once with responses that were not sampled.

    python -m benchmarks.canned HOST PORT

Lengths are lognormal with mean 3,000 and sigma 0.8 (median 2,180, one in a hundred above 14,000), cut at 20,480, and
depend on the prompt alone. Every other response to a prompt ends with the right answer.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from aiohttp import web
from transformers import PreTrainedTokenizerFast

from dapo_megatron.rollout.adapters import vllm
from dapo_megatron.rollout.answer import GENERATE, PROGRESS, encode
from dapo_megatron.rollout.engine import Progress
from dapo_megatron.rollout.place import Place
from dapo_megatron.types import Completion, FinishReason, VersionSpan

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


def lengths(prompt: Sequence[int], n: int) -> list[int]:
    """Return how many tokens each of the n responses to a prompt has."""
    rng = random.Random(str(prompt))
    mu = math.log(MEAN) - SIGMA**2 / 2
    return [min(CAP, max(len(_ending(0)), round(rng.lognormvariate(mu, SIGMA)))) for _ in range(n)]


def _ending(index: int) -> list[int]:
    return [1, 2, 3, 4 + index % 2, 0]


_RNG = np.random.default_rng(0)
_TOKENS = _RNG.integers(len(_FIRST), VOCABULARY, CAP, dtype=np.int32)
_LOGPROBS = -_RNG.exponential(0.3, CAP).astype(np.float32)


def responses(prompt: Sequence[int], n: int) -> list[Completion]:
    """Make the n responses to a prompt."""
    made = []
    for index, length in enumerate(lengths(prompt, n)):
        tokens = _TOKENS[:length].copy()
        tokens[-len(_ending(index)) :] = _ending(index)
        finish = FinishReason.LENGTH if length == CAP else FinishReason.STOP
        made.append(Completion(tokens, _LOGPROBS[:length], finish, (VersionSpan(0, 0, length),)))
    return made


def main(host: str, port: int) -> None:
    turn, looks = asyncio.Semaphore(_AT_ONCE), itertools.count()

    async def generate(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        async with turn:
            response = web.Response(body=encode(responses(asked["token_ids"], asked["n"])))
            await response.prepare(request)
            await response.write_eof()
            return response

    async def progress(request: web.Request) -> web.Response:
        # It never seems to stand still.
        return web.json_response(asdict(Progress(tokens=next(looks), finished=0)))

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post(GENERATE, generate)
    app.router.add_get(PROGRESS, progress)
    app.router.add_get("/health", health)
    web.run_app(app, host=host, port=port, print=None, access_log=None)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
