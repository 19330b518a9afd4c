"""vLLM as a rollout engine, over HTTP. Nothing of vLLM is imported here.

Run against 0.32. Earlier versions down to 0.25 speak the same requests, except that they neither report which weights
wrote a token nor keep a version number; both are then taken from the updates sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import aiohttp
import torch

from dapo_megatron.config import Config
from dapo_megatron.errors import EngineError
from dapo_megatron.rollout.engine import Sampling
from dapo_megatron.rollout.server import Server, check_gpus
from dapo_megatron.types import Completion, FinishReason, Prompt, VersionSpan

WORKER_EXTENSION = "dapo_megatron.weights.vllm_worker.WorkerExtension"
"""Named, not imported: vLLM imports it in its own workers, where it registers the transports."""
_DEATH_SECONDS = 1.0
"""How long to wait, after a connection broke, for the process to turn out dead."""
_ANSWER_CHARACTERS = 500
"""Of an answer that cannot be read, in the message about it."""
_OF_THE_RANKS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|(OMP|MKL)_NUM_THREADS"
)
"""What torchrun and the command line put into the environment; vLLM would take it for its own."""


def vllm_command(config: Config, replica: int, port: int) -> list[str]:
    """The command line of one replica."""
    engine = config.engine
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(config.model.path)),
        *("--host", engine.host, "--port", str(port)),
        *("--dtype", config.model.dtype),
        *("--max-model-len", str(config.max_sequence_tokens)),
        *("--max-num-seqs", str(engine.max_sequences)),
        *("--tensor-parallel-size", str(engine.tensor_parallel)),
        *("--seed", str(replica_seed(config, replica))),
        # Log-probs of the distribution that is sampled from, temperature and top-p included.
        *("--logprobs-mode", "processed_logprobs"),
        # Ignore sampling defaults that a checkpoint brings along (top-k, repetition penalty).
        *("--generation-config", "vllm"),
        # Tokens in, tokens out: no tokenizer, no chat endpoints.
        "--tokens-only",
        *("--worker-extension-cls", WORKER_EXTENSION),
        *("--weight-transfer-config", f'{{"backend": "{config.weights.transport}"}}'),
        "--disable-log-stats",
        "--disable-uvicorn-access-log",
    ]
    if config.model.trust_remote_code:
        command.append("--trust-remote-code")
    if torch.cuda.is_available():
        command += ["--gpu-memory-utilization", str(engine.memory_fraction)]
    else:
        command.append("--enforce-eager")
        if engine.tensor_parallel == 1:
            # One process less to start and to talk to.
            command += ["--distributed-executor-backend", "uni"]
    return [*command, *engine.extra_args]


def replica_seed(config: Config, replica: int) -> int:
    """31 bits of a hash: seeds made by adding would give neighbouring runs each other's streams."""
    seed = config.train.seed if config.engine.seed is None else config.engine.seed
    digest = hashlib.sha256(f"{seed}:{replica}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFF_FFFF


def vllm_env(
    config: Config, replica: int, inherited: Mapping[str, str] = os.environ, ranks: int | None = None
) -> dict[str, str]:
    """The environment of one replica: ours without what was put there for the ranks.

    Args:
        ranks: ranks on this machine, whose GPUs are not for engines; None asks `inherited`.

    Raises:
        ConfigError: where ranks and engines need more GPUs than there are.
    """
    env = {name: value for name, value in inherited.items() if not _OF_THE_RANKS.fullmatch(name)}
    env |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Serves the requests that change weights.
        "VLLM_SERVER_DEV_MODE": "1",
        # A replica's processes are all on this machine: they need not listen to others.
        "VLLM_HOST_IP": "127.0.0.1",
    }
    if torch.cuda.is_available():
        ranks = int(inherited.get("LOCAL_WORLD_SIZE", "1")) if ranks is None else ranks
        return env | {"CUDA_VISIBLE_DEVICES": ",".join(_gpus(config, replica, ranks, inherited))}
    threads = max(1, (len(os.sched_getaffinity(0)) - 1) // config.engine.replicas)
    return env | {
        "VLLM_CPU_KVCACHE_SPACE": str(config.engine.cpu_kv_gib),
        "TORCH_COMPILE_DISABLE": "1",
        # vLLM's condition for honouring `uni` on CPU.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if config.engine.tensor_parallel == 1 else "1",
        "OMP_NUM_THREADS": str(threads),
        # Spinning threads would take the cores from the trainer, which waits while we work and works while we wait.
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
    }


def _gpus(config: Config, replica: int, ranks: int, inherited: Mapping[str, str]) -> list[str]:
    """GPUs of one replica, after those of the ranks and of the replicas before it."""
    count = torch.cuda.device_count()
    check_gpus(config.engine, ranks, count)
    names = (inherited.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
    size = config.engine.tensor_parallel
    first = ranks + replica * size
    return names[first : first + size]


class VllmEngine:
    """An Engine that is a vLLM server.

    Args:
        server: its processes.
        url: where it answers.
        workers: its processes that hold weights.
        decode: token ids to text, for `Completion.text`.
        request_seconds: limit on one request, from when it is sent; the engine may queue it.
        connections: requests sent at once; more wait here.
    """

    def __init__(
        self,
        server: Server,
        url: str,
        *,
        workers: int,
        decode: Callable[[Sequence[int]], str],
        request_seconds: float,
        connections: int = 512,
    ) -> None:
        self.name = server.name
        self.workers = workers
        self._server = server
        self._url = url
        self._decode = decode
        self._request_seconds = request_seconds
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None
        self.version = 0

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
        params: dict[str, Any] = {
            "n": n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "stop_token_ids": list(sampling.stop_token_ids),
            # Otherwise the end tokens of the checkpoint's config would stop a response as well.
            "ignore_eos": True,
            # The sampled token's own, no alternatives.
            "logprobs": 0,
        }
        version = self.version
        body = {"token_ids": list(prompt.token_ids), "sampling_params": params}
        what = f"generating for prompt {prompt.uid}"
        answer = await self._call("POST", "/inference/v1/generate", body, what=what)
        with self._reading(answer, what):
            completions = [self._completion(choice, version) for choice in answer["choices"]]
        if len(completions) != n:
            raise EngineError(f"{self.name}: asked for {n} responses to prompt {prompt.uid}, got {len(completions)}")
        return completions

    async def init_transfer(self, info: dict[str, Any]) -> None:
        await self._call("POST", "/init_weight_transfer_engine", {"init_info": info})

    async def start_update(self) -> None:
        await self._call("POST", "/pause?mode=wait", {})
        await self._call("POST", "/start_weight_update", {})

    async def update(self, info: dict[str, Any]) -> None:
        await self._call("POST", "/update_weights", {"update_info": info})

    async def finish_update(self, version: int) -> None:
        await self._call("POST", "/finish_weight_update", {"weight_version": str(version)})
        # Keys and values of the old weights would otherwise answer for prompts seen before.
        reset = await self._call("POST", "/reset_prefix_cache", {})
        with self._reading(reset, "/reset_prefix_cache"):
            emptied = reset is None or reset["success"]
        if not emptied:
            raise EngineError(f"{self.name} did not empty its prefix cache: requests are still running")
        info = await self._call("GET", "/weight_info", missing={})
        with self._reading(info, "/weight_info"):
            held = info.get("weight_version", str(version))
        if held != str(version):
            raise EngineError(f"{self.name} holds weights of version {held!r} after an update to {version}")
        self.version = version
        await self._call("POST", "/resume", {})

    async def close(self) -> None:
        """Let go of the connection and end the processes. Safe to call twice."""
        if self._session:
            await self._session.close()
            self._session = None
        await asyncio.to_thread(self._server.close)

    def _completion(self, choice: dict[str, Any], version: int) -> Completion:
        tokens = tuple(choice["token_ids"])
        reason = choice["finish_reason"]
        if reason not in list(FinishReason):
            raise EngineError(f"{self.name}: a response ended with {reason!r}; known are {', '.join(FinishReason)}")
        spans = choice.get("weight_versions") or [{"version": str(version), "start": 0, "end": len(tokens)}]
        return Completion(
            token_ids=tokens,
            logprobs=tuple(float(entry["logprob"]) for entry in choice["logprobs"]["content"] or ()),
            finish=FinishReason(reason),
            text=self._decode(tokens),
            versions=tuple(VersionSpan(_version(span["version"]), span["start"], span["end"]) for span in spans),
        )

    async def _call(
        self, method: str, path: str, body: Any = None, *, what: str | None = None, missing: Any = None
    ) -> Any:
        """The JSON that the server answers, None for an answer without content.

        `missing`, where that is given, for a path that the server does not know.
        """
        what = what or path
        if self._session is None:
            # One connection per request: a kept one may be closed by the server just as we use it again.
            self._session = aiohttp.ClientSession(
                self._url,
                connector=aiohttp.TCPConnector(limit=self._connections, force_close=True),
                # Counted from when a request is sent: waiting for a connection is no fault of the engine.
                timeout=aiohttp.ClientTimeout(total=None, sock_read=self._request_seconds),
            )
        try:
            async with self._session.request(method, path, json=body) as response:
                if response.status == 404 and missing is not None:
                    return missing
                if response.status != 200:
                    failure = f"{what}: HTTP {response.status}: {(await response.text())[:2000]}"
                    raise EngineError(await self._describe(failure, dying=response.status >= 500))
                content = await response.read()
                with self._reading(content, what):
                    return json.loads(content) if content else None
        except TimeoutError as error:
            failure = f"{what}: no answer within {self._request_seconds:g} s (engine.request_seconds)"
            raise EngineError(await self._describe(failure)) from error
        except aiohttp.ClientError as error:
            raise EngineError(await self._describe(f"{what}: {error or type(error).__name__}", dying=True)) from error

    @contextmanager
    def _reading(self, answer: Any, what: str) -> Iterator[None]:
        """Turn whatever goes wrong while `answer` is taken apart into the engine's error."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            shown = repr(answer)  # spells control characters
            shown = shown if len(shown) <= _ANSWER_CHARACTERS else f"{shown[:_ANSWER_CHARACTERS]} ..."
            raise EngineError(
                f"{self.name}, {what}: cannot read the answer ({type(error).__name__}: {error}): {shown}"
            ) from error

    async def _describe(self, failure: str, dying: bool = False) -> str:
        """`failure`, with the state of the process; when it is `dying`, that may take a moment to show."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + _DEATH_SECONDS
        while dying and self._server.alive and clock() < deadline:
            await asyncio.sleep(0.05)
        return f"{self.name}, {failure}\n{self._server.describe()}"


def _version(name: str) -> int:
    """vLLM calls the weights that it loaded itself "default"."""
    return 0 if name == "default" else int(name)
