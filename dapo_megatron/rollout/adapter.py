"""What is particular to one kind of engine, and how `engine.kind` finds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from dapo_megatron.config import Config, named
from dapo_megatron.errors import ConfigError
from dapo_megatron.rollout import adapters
from dapo_megatron.rollout.engine import Engine
from dapo_megatron.rollout.place import Place
from dapo_megatron.rollout.server import Server


class EngineAdapter(Protocol):
    """Starts and speaks to one kind of engine. Runs in the trainer, so it imports nothing of the engine's package.

    Its server finds the token that every request has to show in the environment (`token.TOKEN`), and refuses others:
    they could change the weights.

    Its docstring says what becomes of `Sampling.seed`, and what the engine needs so that a response depends on nothing
    else: SGLang, for example, heeds `sampling_seed` only with --enable-deterministic-inference.
    """

    packages: Mapping[str, str]
    """What the Python that runs the engine has to have: package -> how to install it."""
    health: str
    """Path at which the server answers with status 200 once it can be used, without a token. Behind
    `endpoints.asgi.Middleware`, which answers everything else only to those who show it, that is "/health"."""

    def __init__(self, config: Config) -> None: ...

    def check(self, hf_config: Any) -> None:
        """Refuse what this kind of engine cannot do. Called before anything is started.

        Args:
            hf_config: the model's Hugging Face configuration.

        Raises:
            ConfigError: says which keys do not go together.
        """
        ...

    def command(self, place: Place) -> list[str]:
        """The command line of one engine, to be run in the foreground."""
        ...

    def environment(self, place: Place) -> dict[str, str]:
        """What to add to `environment.environment`."""
        ...

    def connect(self, server: Server, place: Place) -> Engine:
        """Speak to the engine that `command` started. It need not answer yet.

        Args:
            server: its processes, which fail with an account of how they ended.
        """
        ...


def check_heads(config: Config, hf_config: Any) -> None:
    """
    Raises:
        ConfigError: where the model's heads cannot be shared out among engine.tensor_parallel processes.
    """
    size, heads = config.engine.tensor_parallel, hf_config.num_attention_heads
    shared = getattr(hf_config, "num_key_value_heads", None) or heads
    works = [n for n in range(1, heads + 1) if heads % n == 0 and (shared % n == 0 or n % shared == 0)]
    if size not in works:
        raise ConfigError(
            f"engine.tensor_parallel({size}) does not go with the model's num_attention_heads({heads}), which it has "
            f"to divide, and num_key_value_heads({shared}), of which it has to be a divisor or a multiple; choose one "
            f"of {', '.join(map(str, works))}"
        )


def adapter_for(config: Config, kind: str) -> EngineAdapter:
    """The adapter that engine.kind names: a module of `rollout.adapters`, or `some.module:name` for any other class.

    Raises:
        ConfigError: where there is none of that name.
    """
    key = "engine.kinds" if config.engine.kinds else "engine.kind"
    try:
        make = named.find(kind, adapters.__name__, "Adapter", type)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error
    methods, attributes = {"check", "command", "environment", "connect"}, {*EngineAdapter.__annotations__}
    # What is no adapter cannot be made as one; attributes may be there only then.
    whole = all(hasattr(make, name) for name in methods)
    adapter = make(config) if whole else make
    if missing := sorted(name for name in methods | attributes if not hasattr(adapter, name)):
        raise ConfigError(f"{key}: {kind} lacks {', '.join(missing)}; rollout/adapter.py says what an adapter has")
    return adapter
