"""SGLang's server with `Endpoint` before its own paths.

    python -m dapo_megatron.rollout.endpoints.sglang WORKER ARGUMENTS

WORKER names the module that takes the weights (`weights.workers.sglang`); ARGUMENTS are those of SGLang's server. Its
processes import this module before SGLang.

The server's own answers are JSON, about 40 bytes and several objects for every token, on both sides. Here the answer is
`rollout.answer`.
"""

# SGLang is in an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

import itertools
import logging
import os
import secrets
import sys
import tempfile
from importlib import import_module
from typing import Any

import numpy as np
import torch

from dapo_megatron.rollout.about import About, sizes_of
from dapo_megatron.rollout.answer import encode
from dapo_megatron.rollout.endpoints.asgi import Message, Middleware, check_tokens, version
from dapo_megatron.rollout.token import TOKEN, authorization
from dapo_megatron.types import Completion, FinishReason, VersionSpan

SPARE_TOKENS = 8
"""SGLang's context has to be longer by these than any sequence: it keeps places free."""

_SEED_BITS = 62


def let_torchvision_be_imported() -> None:
    """Declare the operators that torchvision wants to be there, where its library does not fit this torch.

    SGLang imports it for models that see. The index of packages has it for CUDA only, and beside torch's CPU build its
    library does not load, which it tolerates in all places but one.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            _OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
"""Its operators are there as long as it is."""
let_torchvision_be_imported()


class Endpoint(Middleware):
    """See `Middleware`."""

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        self._numbers = itertools.count()
        self._open: dict[int, list[str]] = {}
        """Requests that are being served -> SGLang's names of their responses."""

    def client(self, scope: Message) -> Any:
        from sglang.srt.entrypoints import http_server

        return http_server.get_global_state().tokenizer_manager

    def progress(self, client: Any) -> dict[str, int]:
        """Look at SGLang's books, which hear of new tokens every SGLANG_FORCE_STREAM_INTERVAL of a response."""
        tokens = finished = 0
        for names in self._open.values():
            unfinished = [state for name in names if (state := client.rid_to_state.get(name))]
            tokens += sum(len(state.output_ids) for state in unfinished)
            finished += len(names) - len(unfinished) if unfinished else 0
        return {"tokens": tokens, "finished": finished}

    def about(self, client: Any) -> About:
        model = client.model_config
        return About(
            kind="sglang",
            dtype=str(model.dtype).removeprefix("torch."),
            transport="gloo",
            workers=client.server_args.tp_size,
            sequence_tokens=client.context_len - SPARE_TOKENS,
            model=sizes_of(model.hf_config),
        )

    async def generate(self, client: Any, request: dict[str, Any]) -> bytes:
        from sglang.srt.managers.io_struct import GenerateReqInput

        n, ends, seed = request["n"], request["stop_token_ids"], request["seed"]
        _check(request)
        check_tokens(request, client.model_config.vocab_size, client.context_len - SPARE_TOKENS, "the longest sequence")
        if seed is None:
            seed = secrets.randbits(_SEED_BITS)
        sampling = {
            "temperature": request["temperature"],
            "top_p": request["top_p"],
            "max_new_tokens": request["max_tokens"],
            "stop_token_ids": ends,
            # It would ignore `stop_token_ids` as well.
            "ignore_eos": not ends,
        }
        number = next(self._numbers)
        # SGLang gives up what begins with a name: none may be the beginning of another.
        names = [f"dapo-{number}-{index}." for index in range(n)]
        self._open[number] = names
        try:
            wanted = GenerateReqInput(
                rid=names,
                input_ids=[request["token_ids"]] * n,
                # Not n of one request, which have one stream.
                sampling_params=[{**sampling, "sampling_seed": seed + index} for index in range(n)],
                return_logprob=True,
                logprob_start_len=-1,
            )
            # The only one: all responses, once the last is written.
            outputs = [output async for output in client.generate_request(wanted, None)]
        finally:
            del self._open[number]
        return encode([_completion(output) for output in outputs[-1]])


def _check(request: dict[str, Any]) -> None:
    """Refuse what SGLang would take, and serve as something else."""
    for key in ("n", "max_tokens"):
        if not isinstance(request[key], int) or request[key] < 1:
            raise ValueError(f"{key} must be at least 1, got {request[key]!r}")
    if not request["token_ids"]:
        raise ValueError("token_ids is empty")
    if not all(isinstance(token, int) for token in request["stop_token_ids"]):
        raise ValueError(f"stop_token_ids must be integers, got {request['stop_token_ids']!r}")


def _completion(output: dict[str, Any]) -> Completion:
    about = output["meta_info"]
    return Completion(
        token_ids=np.array(output["output_ids"], np.int32),
        logprobs=np.array([entry[0] for entry in about["output_token_logprobs"]], np.float32),
        finish=FinishReason(about["finish_reason"]["type"]),
        versions=tuple(
            VersionSpan(version(span["version"]), span["start"], span["end"]) for span in about["weight_versions"]
        ),
        cached_tokens=about["cached_tokens"],
    )


def freeze_gc(server_args: Any) -> None:
    """Have its processes leave what they have made so far out of garbage collection, as SGLang does once it is up.

    It asks its own server, and would not show the token.
    """
    import requests

    with requests.Session() as session:
        session.trust_env = False  # a proxy would be shown the token, and ~/.netrc replace it
        session.headers["Authorization"] = authorization(os.environ[TOKEN])
        try:
            session.post(f"{server_args.url()}/freeze_gc", timeout=10).raise_for_status()
        except requests.RequestException as error:
            logging.getLogger(__name__).warning("garbage collection stays as it is: %s", error)


def main(worker: str, arguments: list[str]) -> None:
    from sglang.srt.arg_groups.choices import add_deterministic_attention_backend_choices
    from sglang.srt.entrypoints import http_server
    from sglang.srt.server_args import prepare_server_args

    # Its processes meet at a file: a port would be open on every interface.
    os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{tempfile.mkdtemp()}/processes"
    # Takes one sequence after the other, so none depends on the others.
    add_deterministic_attention_backend_choices(["torch_native"])
    http_server.app.add_middleware(Endpoint)
    http_server._freeze_gc_after_server_warmup = freeze_gc
    http_server.launch_server(
        prepare_server_args(arguments), run_scheduler_process_func=import_module(worker).run_scheduler
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
