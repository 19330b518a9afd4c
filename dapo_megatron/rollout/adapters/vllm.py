"""vLLM as an engine, over HTTP.

Run against 0.25.1 and 0.32. They speak the same requests; what 0.25 lacks is

- which weights wrote a token, and a version number of them: both are then taken from the transfers,
- an answer to whether the prefix cache was emptied: it is, as no request runs then,
- a process group whose ranks meet at a file: theirs meet at a port that is open on every interface,
- `VLLMClientError` (see `rollout.endpoints.vllm`, the endpoint of ours in its server that responses come from),

and what it wants besides is `trainer_send_weights` (see `weights.workers.vllm`).
"""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from dapo_megatron.config import Config
from dapo_megatron.errors import ConfigError, EngineError
from dapo_megatron.rollout.adapter import EngineAdapter, check_heads
from dapo_megatron.rollout.client import Client
from dapo_megatron.rollout.engine import Engine
from dapo_megatron.rollout.http_engine import HttpEngine
from dapo_megatron.rollout.place import Place
from dapo_megatron.rollout.server import UNKNOWN, Server

WORKER_EXTENSION = "dapo_megatron.weights.workers.vllm.WorkerExtension"
"""Named, not imported: vLLM imports it in its own workers, where it registers the transports."""
ENDPOINT = "dapo_megatron.rollout.endpoints.vllm.Endpoint"
"""Named, not imported: vLLM imports it in its server."""

_UPDATE = ("tensors", "checksums", "kept", "room", "starts", "folder")
"""What workers are told of a bucket, or of a whole push (`WeightReceiver.receive`)."""

_CACHE, _BINDING = "VLLM_CACHE_ROOT", "VLLM_CPU_OMP_THREADS_BIND"
_PACKAGE, _CPU_ATTENTION = "vllm", "v1/attention/backends/cpu_attn.py"

_BATCHED_TOKENS = 8192
"""Tokens that go through the model at once on CPU, where there are so many."""


class Adapter(EngineAdapter):
    """See `EngineAdapter`.

    Seeds: responses are those of the seed, as far as "Reproducible rollouts" in docs/architecture.md says.
    """

    packages = {"vllm": "pip install -e '.[cpu]' in the checkout; with CUDA, as requirements/gpu.txt says"}
    health = "/health"

    def __init__(self, config: Config) -> None:
        self._config = config

    def check(self, hf_config: Any) -> None:
        check_heads(self._config, hf_config)
        if not self._config.engine.urls:
            size = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
            self._check_head_size(size)

    def _check_head_size(self, size: int) -> None:
        """Refuse what vLLM finds out in its first forward pass: its attention on CPU has kernels for some sizes."""
        import torch

        if torch.cuda.device_count():
            return
        known = _cpu_head_sizes(self._config.engine.python)
        if known and size not in known:
            raise ConfigError(
                f"model.path: the heads of this model have {size} numbers (head_dim, or hidden_size / "
                f"num_attention_heads), and vLLM's attention on CPU has {', '.join(map(str, known))}; choose a model "
                f"with one of these, or a machine with GPUs"
            )

    def command(self, place: Place) -> list[str]:
        config, engine = self._config, self._config.engine
        command = [
            *(str(engine.python or sys.executable), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(config.model.path)),
            *("--host", place.host, "--port", str(place.port)),
            *("--dtype", config.model.dtype),
            *("--max-model-len", str(config.max_sequence_tokens)),
            *("--max-num-seqs", str(engine.max_sequences)),
            *("--tensor-parallel-size", str(engine.tensor_parallel)),
            *("--seed", str(place.seed)),
            # Log-probs of the distribution that is sampled from, temperature and top-p included.
            *("--logprobs-mode", "processed_logprobs"),
            # Ignore sampling defaults that a checkpoint brings along (top-k, repetition penalty).
            *("--generation-config", "vllm"),
            # Tokens in, tokens out: no tokenizer, no chat endpoints.
            "--tokens-only",
            *("--worker-extension-cls", WORKER_EXTENSION),
            *("--middleware", ENDPOINT),
            *("--weight-transfer-config", f'{{"backend": "dapo-{config.weights.transport}"}}'),
            "--disable-log-stats",
            "--disable-uvicorn-access-log",
        ]
        if config.model.trust_remote_code:
            command.append("--trust-remote-code")
        if place.gpus:
            # Also beside a cache of a given size: vLLM starts only where so much of the GPU is free.
            command += ["--gpu-memory-utilization", str(place.memory_fraction)]
            if engine.kv_cache_gib:
                command += ["--kv-cache-memory-bytes", str(engine.kv_cache_gib << 30)]
            if place.sleeps:
                # The CPU build refuses this, and takes the requests without it: it does nothing then but keep books.
                command.append("--enable-sleep-mode")
        else:
            # Prompts are read whole: with a seed, vLLM fails over part of one ("CPU Generator does not use offset").
            command += ["--enforce-eager", "--no-enable-chunked-prefill"]
            command += ["--max-num-batched-tokens", str(self._batched_tokens)]
            if engine.tensor_parallel == 1:
                # One process less to start and to talk to.
                command += ["--distributed-executor-backend", "uni"]
        return [*command, *engine.extra_args]

    def environment(self, place: Place) -> dict[str, str]:
        engine = self._config.engine
        env = {
            "VLLM_NO_USAGE_STATS": "1",
            # Serves the requests that change weights.
            "VLLM_SERVER_DEV_MODE": "1",
            # An engine's processes are all on this machine: they need not listen to others. (Those of 0.25 do.)
            "VLLM_HOST_IP": "127.0.0.1",
        }
        if place.gpus:
            return env | _own_cache(place) | ({"VLLM_BATCH_INVARIANT": "1"} if engine.batch_invariant else {})
        if engine.tensor_parallel > 1 and _BINDING not in os.environ:
            # Otherwise it wants a NUMA node of its own for each of its processes.
            env[_BINDING] = "nobind"
        return env | {
            "VLLM_CPU_KVCACHE_SPACE": str(engine.kv_cache_gib or 1),
            "TORCH_COMPILE_DISABLE": "1",
            # Otherwise attention adds up in parts that depend on the other sequences and on the number of threads.
            "VLLM_CPU_ATTN_SPLIT_KV": "0",
            # vLLM's condition for honouring `uni` on CPU.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if engine.tensor_parallel == 1 else "1",
        }

    def connect(self, server: Server, place: Place) -> Engine:
        engine, push_seconds = self._config.engine, self._config.weights.push_seconds
        return VllmEngine(
            generation=Client(server, place.url),
            transfer=Client(server, place.url, answer_seconds=push_seconds, limited_by="weights.push_seconds"),
            control=Client(server, place.url, answer_seconds=engine.stall_seconds),
            workers=engine.tensor_parallel,
            keeps=not place.sleeps,
        )

    @property
    def _batched_tokens(self) -> int:
        """Room for the longest sequence, which may have to be read again, and for a token of each."""
        return max(_BATCHED_TOKENS, self._config.max_sequence_tokens, self._config.engine.max_sequences)


class VllmEngine(HttpEngine):
    """An `Engine` that is a vLLM server.

    It sleeps at level 2, which gives the weights up, as they are sent before it samples again in any case. Level 1
    would copy them to host memory and back each time.

    Args:
        keeps: see `Engine`.
        others: those of `HttpEngine`.
    """

    def __init__(self, *, keeps: bool = True, **others: Any) -> None:
        super().__init__(**others)
        self.keeps = keeps

    async def join_group(self, info: dict[str, Any]) -> None:
        await self._change("/init_weight_transfer_engine", {"init_info": info})

    async def reset(self) -> None:
        # vLLM has no request that ends a push of which tensors are missing.
        await self._transfer.call("POST", "/collective_rpc", {"method": "abandon_update"})
        self.version = UNKNOWN
        if not self.asleep:  # otherwise it goes on once it is awake
            await self._transfer.call("POST", "/resume", {})

    async def begin_transfer(self) -> None:
        if not self.asleep:  # otherwise it is paused
            await self._transfer.call("POST", "/pause?mode=wait", {})
        await self._change("/start_weight_update", {})

    async def receive(self, info: dict[str, Any]) -> None:
        # Its workers know the rest from the inventory.
        bucket = {key: info[key] for key in _UPDATE if key in info}
        await self._change("/update_weights", {"update_info": bucket})

    async def finish_transfer(self, version: int) -> None:
        await self._change("/finish_weight_update", {"weight_version": str(version)})
        # Keys and values of the old weights would otherwise answer for prompts seen before.
        reset = await self._transfer.call("POST", "/reset_prefix_cache", {})
        with self._transfer.reading(reset, "/reset_prefix_cache"):
            emptied = reset is None or reset["success"]
        if not emptied:
            raise EngineError(f"{self.name} did not empty its prefix cache: requests are still running")
        info = await self._transfer.call("GET", "/weight_info", missing={})
        with self._transfer.reading(info, "/weight_info"):
            held = info.get("weight_version", str(version))
        if held != str(version):
            raise EngineError(f"{self.name} holds weights of version {held!r} after a transfer of version {version}")
        self.version = version
        if not self.asleep:  # otherwise there is no KV cache to write to
            await self._transfer.call("POST", "/resume", {})

    async def _change(self, path: str, body: dict[str, Any]) -> None:
        """Ask all workers for a part of a push, and then what has become of it: they keep that until they are asked."""
        await self._transfer.call("POST", path, body)
        answer = await self._transfer.call("POST", "/collective_rpc", {"method": "push_failure"})
        with self._transfer.reading(answer, path):
            failures = list(filter(None, answer["results"]))
        if failures:
            server = self._transfer.server
            raise EngineError(f"{self.name}, {path}: {'; '.join(dict.fromkeys(failures))}\n{server.describe()}")

    async def _release(self) -> None:
        # It pauses, and empties the prefix cache.
        await self._transfer.call("POST", "/sleep?level=2&mode=abort", {})

    async def _resume(self, tags: frozenset[str]) -> None:
        # It goes on by itself once all is there.
        await self._transfer.call("POST", f"/wake_up?{urlencode([('tags', tag) for tag in sorted(tags)])}", {})
        answer = await self._transfer.call("GET", "/is_sleeping")
        with self._transfer.reading(answer, "/is_sleeping"):
            asleep = answer["is_sleeping"]
        if asleep != bool(self.asleep - tags):
            raise EngineError(f"{self.name} {'sleeps' if asleep else 'is awake'} after it was woken for {sorted(tags)}")


def _own_cache(place: Place) -> dict[str, str]:
    """Have each engine keep compiled kernels where no other does: in a home that machines share, one engine would read
    the list of them, by its source, while another is writing it. A restart finds them again.
    """
    if _CACHE in os.environ:
        return {}
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return {_CACHE: str(home / "vllm" / f"{socket.gethostname()}-gpu{place.gpus[0]}")}


def _cpu_head_sizes(python: Path | None) -> list[int] | None:
    """Read the head sizes that vLLM's attention on CPU has kernels for; None where it does not say them.

    Read from its source, because importing vLLM takes seconds.

    Args:
        python: the interpreter that runs the engine, if it is another.
    """
    try:
        if python:
            command = [python, "-c", f"from importlib.util import find_spec; print(find_spec({_PACKAGE!r}).origin)"]
            origin = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
        else:
            spec = find_spec(_PACKAGE)
            origin = spec.origin if spec else None
        tree = ast.parse((Path(origin).parent / _CPU_ATTENTION).read_text()) if origin else ast.Module([], [])
        returned = [
            node.value
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and function.name == "get_supported_head_sizes"
            for node in ast.walk(function)
            if isinstance(node, ast.Return) and node.value
        ]
        return list(ast.literal_eval(returned[0])) if len(returned) == 1 else None
    except (OSError, subprocess.SubprocessError, SyntaxError, ValueError):
        return None
