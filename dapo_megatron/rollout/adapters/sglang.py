"""SGLang as an engine, over HTTP. Run against 0.5.23, on CPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import dapo_megatron
from dapo_megatron.config import Config
from dapo_megatron.errors import ConfigError, EngineError
from dapo_megatron.hf_folder import read_hf_config
from dapo_megatron.rollout.adapter import EngineAdapter, check_heads
from dapo_megatron.rollout.client import Client
from dapo_megatron.rollout.engine import KV_CACHE, WEIGHTS, Engine
from dapo_megatron.rollout.http_engine import HttpEngine
from dapo_megatron.rollout.place import Place
from dapo_megatron.rollout.server import UNKNOWN, Server

SERVER = "dapo_megatron.rollout.endpoints.sglang"
WORKER = "dapo_megatron.weights.workers.sglang"
"""Named, not imported: they run in the engine's processes."""

_GROUP = "weights"
"""Name of the transfer group in SGLang's books."""
_VENV = Path(dapo_megatron.__file__).parents[1] / ".venv-sglang/bin/python"
"""Where `make sglang-cpu` puts it."""
_SPARE_TOKENS = 8
"""SGLang's context has to be longer by these than any sequence."""
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


class Adapter(EngineAdapter):
    """See `EngineAdapter`.

    Seeds: on CPU, responses are those of the seed, as far as "Reproducible rollouts" in docs/architecture.md says. On
    GPUs SGLang heeds seeds only with engine.batch_invariant, which is its --enable-deterministic-inference.
    """

    packages: Mapping[str, str] = {}
    health = "/health"

    def __init__(self, config: Config) -> None:
        import torch

        self._config = config
        on_gpus, own = torch.cuda.device_count() > 0, config.engine.python
        found = _VENV if not (own or on_gpus) and _VENV.exists() else None
        self._python = own or found or Path(sys.executable)
        how = "with CUDA, an environment of its own that engine.python names" if on_gpus else "run `make sglang-cpu`"
        # What is installed in the environment that was found, its makefile knows.
        self.packages = {} if found else {"sglang": f"{how}; its requirements do not fit vLLM's"}
        if on_gpus and config.engine.sleeps:
            self.packages["torch_memory_saver"] = "pip install torch-memory-saver there, or set engine.sleep=false"

    def check(self, hf_config: Any) -> None:
        import torch

        config, size = self._config, self._config.engine.tensor_parallel
        check_heads(config, hf_config)
        if size > 1 and not (config.engine.urls or torch.cuda.device_count()):
            raise ConfigError(
                f"engine.tensor_parallel({size}): on CPU, engine.kind=sglang runs in one process; set "
                f"engine.tensor_parallel=1, or engine.kind=vllm"
            )
        if (transport := config.weights.transport) != "gloo":
            raise ConfigError(
                f"weights.transport={transport}: engine.kind=sglang takes weights over gloo; set it to gloo"
            )
        if config.rollout.top_p < 1:
            raise ConfigError(
                f"rollout.top_p({config.rollout.top_p:g}): with engine.kind=sglang, log-probs are those before top-p "
                f"leaves tokens out, so they would not be those that responses are sampled with; set rollout.top_p=1, "
                f"or engine.kind=vllm"
            )

    def command(self, place: Place) -> list[str]:
        config, engine = self._config, self._config.engine
        command = [
            *(str(self._python), "-m", SERVER, WORKER),
            *("--model-path", str(config.model.path)),
            *("--host", place.host, "--port", str(place.port)),
            *("--dtype", config.model.dtype),
            *("--context-length", str(config.max_sequence_tokens + _SPARE_TOKENS)),
            *("--max-running-requests", str(engine.max_sequences)),
            *("--tp-size", str(engine.tensor_parallel)),
            *("--random-seed", str(place.seed)),
            # Ignore sampling defaults that a checkpoint brings along (top-k, repetition penalty).
            *("--sampling-defaults", "openai"),
            # Tokens in, tokens out.
            "--skip-tokenizer-init",
            *("--grammar-backend", "none"),
            # `Engines` asks for a token itself.
            "--skip-server-warmup",
            *("--log-level", "warning"),
        ]
        if config.model.trust_remote_code:
            command.append("--trust-remote-code")
        if place.gpus:
            command += ["--mem-fraction-static", str(place.memory_fraction)]
            if engine.batch_invariant:
                command.append("--enable-deterministic-inference")
            if place.sleeps:
                # Without it, the requests do nothing but keep books.
                command.append("--enable-memory-saver")
        else:
            command += ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
            command += ["--disable-cuda-graph", "--disable-overlap-schedule"]
            # Of the memory that nobody uses, which must leave something; the size of the cache is given.
            command += ["--mem-fraction-static", "0.99"]
            # Seeds of requests are heeded only so. It goes without a prefix cache.
            command += ["--enable-deterministic-inference", "--chunked-prefill-size", "-1"]
        if engine.kv_cache_gib or not place.gpus:
            command += ["--max-total-tokens", str(self._cache_tokens)]
        return [*command, *engine.extra_args]

    def environment(self, place: Place) -> dict[str, str]:
        env = {
            # `--context-length` is longer than the model's by what SGLang keeps free.
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
            # Being asked whether it is there need not write a token.
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
            # The server hears of each token when it is written, for `progress`.
            "SGLANG_FORCE_STREAM_INTERVAL": "1",
            # Where a process has died, the others end at once, and not after 5 s, or 65 s where several hold the
            # model, which are for dumps.
            "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
            "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
        }
        if place.gpus:
            return env
        # Torch's own kernels in place of those of a package that is built for some processors.
        return env | {"SGLANG_USE_CPU_ENGINE": "0", "TORCH_COMPILE_DISABLE": "1"}

    def connect(self, server: Server, place: Place) -> Engine:
        engine, push_seconds = self._config.engine, self._config.weights.push_seconds
        return SglangEngine(
            generation=Client(server, place.url),
            transfer=Client(server, place.url, answer_seconds=push_seconds, limited_by="weights.push_seconds"),
            control=Client(server, place.url, answer_seconds=engine.stall_seconds),
            workers=engine.tensor_parallel,
        )

    @property
    def _cache_tokens(self) -> int:
        """Tokens whose keys and values engine.kv_cache_gib holds on each GPU, or one GiB on CPU."""
        model, engine = self._config.model, self._config.engine
        hf_config = read_hf_config(model.path, trust_remote_code=model.trust_remote_code)
        heads = hf_config.num_attention_heads
        size = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
        kv_heads = max(1, (getattr(hf_config, "num_key_value_heads", None) or heads) // engine.tensor_parallel)
        token_bytes = 2 * hf_config.num_hidden_layers * kv_heads * size * _ITEM_BYTES[model.dtype]
        return ((engine.kv_cache_gib or 1) << 30) // token_bytes


class SglangEngine(HttpEngine):
    """An `Engine` that is an SGLang server."""

    async def join_group(self, info: dict[str, Any]) -> None:
        group = {
            "master_address": info["host"],
            "master_port": info["port"],
            "rank_offset": info["rank_offset"],
            "world_size": info["world_size"],
            "group_name": _GROUP,
            # The worker reads what SGLang's requests have no fields for where SGLang does not (`weights.workers`).
            "backend": json.dumps({key: info[key] for key in ("timeout_seconds", "inventory")}),
        }
        await self._change("/init_weights_update_group", group)

    async def reset(self) -> None:
        with suppress(EngineError):  # there is no push to end, as a rule
            await self._change("/end_weight_update", {})
        self.version = UNKNOWN
        if not self.asleep:  # otherwise it goes on once it is awake
            await self._transfer.call("POST", "/continue_generation", {})

    async def begin_transfer(self) -> None:
        if not self.asleep:  # otherwise it is paused
            await self._pause()
        await self._change("/begin_weight_update", {"selector": "all"})

    async def receive(self, info: dict[str, Any]) -> None:
        # Which tensors these are, the worker knows from the inventory.
        known = {"names": [], "dtypes": [], "shapes": []}
        bucket = json.dumps({key: info[key] for key in ("tensors", "checksums")})
        request = {**known, "group_name": _GROUP, "load_format": bucket, "flush_cache": False}
        await self._change("/update_weights_from_distributed", request)

    async def finish_transfer(self, version: int) -> None:
        await self._change("/end_weight_update", {})
        # Keys and values of the old weights would otherwise answer for prompts seen before.
        await self._transfer.fetch("POST", "/flush_cache")
        await self._change("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        info = await self._transfer.call("GET", "/model_info")
        with self._transfer.reading(info, "/model_info"):
            held = info["weight_version"]
        if held != str(version):
            raise EngineError(f"{self.name} holds weights of version {held!r} after a transfer of version {version}")
        self.version = version
        if not self.asleep:  # otherwise there is no KV cache to write to
            await self._transfer.call("POST", "/continue_generation", {})

    async def _release(self) -> None:
        # SGLang ends where it is to give up memory while something is written. It empties its prefix cache with this.
        await self._pause()
        await self._transfer.call("POST", "/release_memory_occupation", {"tags": [KV_CACHE, WEIGHTS]})

    async def _resume(self, tags: frozenset[str]) -> None:
        await self._transfer.call("POST", "/resume_memory_occupation", {"tags": sorted(tags)})
        if tags == self.asleep:
            await self._transfer.call("POST", "/continue_generation", {})

    async def _pause(self) -> None:
        """What is being written is put off, and its beginning read again with the new weights."""
        await self._transfer.call("POST", "/pause_generation", {"mode": "retract"})

    async def _change(self, path: str, body: dict[str, Any]) -> None:
        """Ask for what may fail without the server failing."""
        answer = await self._transfer.call("POST", path, body)
        with self._transfer.reading(answer, path):
            success, message = answer["success"], answer["message"]
        if not success:
            raise EngineError(f"{self.name}, {path}: {message}")
