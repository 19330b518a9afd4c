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

    Its docstring says what becomes of `Sampling.seed`, and what the engine needs so that a response depends on nothing
    else: SGLang, for example, heeds `sampling_seed` only with --enable-deterministic-inference.
    """

    packages: Mapping[str, str]
    """What the Python that runs the engine has to have: package -> how to install it."""
    health: str
    """Path at which the server answers with status 200 once it can be used."""

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


def adapter_for(config: Config, kind: str) -> EngineAdapter:
    """The adapter that engine.kind names: a module of `rollout.adapters`, or `some.module:name` for any other class.

    Raises:
        ConfigError: where there is none of that name.
    """
    try:
        make = named.find(kind, adapters.__name__, "Adapter", type)
    except ValueError as error:
        raise ConfigError(f"engine.kind: {error}") from error
    members = {*EngineAdapter.__annotations__, "check", "command", "environment", "connect"}
    if missing := sorted(name for name in members if not hasattr(make, name)):
        raise ConfigError(
            f"engine.kind: {kind} lacks {', '.join(missing)}; rollout/adapter.py says what an adapter has"
        )
    return make(config)
