"""Runs inside vLLM's server, which is given `Endpoint` as `--middleware`.

The server's own answers are JSON of OpenAI's shape: about 150 bytes and several objects for every token, on both sides.
Here the answer is `rollout.answer`, made from what vLLM's Python API gives.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from vllm import SamplingParams, exceptions
from vllm.inputs import tokens_input
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind

from dapo_megatron.rollout.about import About, sizes_of
from dapo_megatron.rollout.answer import encode
from dapo_megatron.rollout.endpoints.asgi import Message, Middleware, check_tokens, version
from dapo_megatron.types import Completion, FinishReason, VersionSpan


class Endpoint(Middleware):
    """See `Middleware`. The versions of responses are missing where vLLM reports none (0.25)."""

    # In 0.25 vLLM's own are ValueErrors.
    refused = (*Middleware.refused, getattr(exceptions, "VLLMClientError", ValueError))

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        self._numbers = itertools.count()
        self._open: dict[str, int] = {}
        """Requests that are being served -> how many responses they want."""

    def client(self, scope: Message) -> Any:
        return scope["app"].state.engine_client

    def progress(self, client: Any) -> dict[str, int]:
        """Look at vLLM's books: its own counters cost work for every token (`--disable-log-stats`)."""
        books = client.output_processor
        unfinished = books.external_req_ids
        return {
            "tokens": sum(state.detokenizer.num_output_tokens() for state in books.request_states.values()),
            "finished": sum(n - len(unfinished[name]) for name, n in self._open.items() if name in unfinished),
        }

    def about(self, client: Any) -> About:
        model = client.model_config
        return About(
            kind="vllm",
            dtype=str(model.dtype).removeprefix("torch."),
            transport=client.vllm_config.weight_transfer_config.backend.removeprefix("dapo-"),
            workers=client.vllm_config.parallel_config.world_size,
            sequence_tokens=model.max_model_len,
            model=sizes_of(model.hf_config),
        )

    async def generate(self, client: Any, request: dict[str, Any]) -> bytes:
        n, config = request["n"], client.model_config
        check_tokens(request, config.get_vocab_size(), config.max_model_len, "--max-model-len")
        sampling = SamplingParams(
            n=n,
            temperature=request["temperature"],
            top_p=request["top_p"],
            max_tokens=request["max_tokens"],
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
            outputs: list[RequestOutput] = [
                output async for output in client.generate(tokens_input(request["token_ids"]), sampling, name)
            ]
        finally:
            del self._open[name]
        # vLLM tells it once for all responses to a prompt: of the last one.
        cached = outputs[-1].num_cached_tokens or 0
        return encode([_completion(output, cached) for output in outputs[-1].outputs])


def _completion(output: CompletionOutput, cached_tokens: int) -> Completion:
    spans = getattr(output, "weight_versions", None) or ()
    logprobs: Any = output.logprobs  # flat: one entry for each token, as no alternatives are asked for
    return Completion(
        token_ids=np.array(output.token_ids, np.int32),
        logprobs=np.array(logprobs.logprobs, np.float32),
        finish=FinishReason(output.finish_reason),
        versions=tuple(VersionSpan(version(span.version), span.start, span.end) for span in spans),
        cached_tokens=cached_tokens,
    )
