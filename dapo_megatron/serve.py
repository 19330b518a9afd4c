"""Engines that run on their own, for runs on other machines: `dapo-megatron engines CONFIG`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import closing

from dapo_megatron.config import Config
from dapo_megatron.errors import ConfigError
from dapo_megatron.preflight import preflight_engines
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.rollout.token import TOKEN, engines_folder, keep_token, token_file
from dapo_megatron.signals import heeded


def serve(config: Config, tell: Callable[[str], None], say: Callable[[str], None]) -> None:
    """Start engine.count engines here, and keep them until this process is asked to end, or one of them fails.

    Args:
        config: of a run that is to use them, but for engine.placement and urls, which are its own.
        tell: is given each URL, once all engines answer.
        say: is given everything else that a person should know.

    Raises:
        ConfigError: for what cannot work.
        EngineError: with the reason, when an engine fails; all have ended then.
        SystemExit: 128 + the number of a signal.
    """
    for warning in preflight_engines(config):
        say(f"warning: {warning}")
    token = keep_token(config)
    for number in {signal.SIGTERM, signal.SIGHUP} & {*heeded()}:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    # Several machines may share the folder, and a machine may have more than one of these commands.
    which = f"port{config.engine.port}" if config.engine.port else f"process{os.getpid()}"
    folder = engines_folder(config) / f"{socket.gethostname()}-{which}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir: the engines' logs cannot be written to {folder}: {error}") from error
    say(f"starting engines of {config.model.path}; their logs are in {folder}")
    with closing(Engines(config, folder, ranks=0, token=token)) as engines:
        engines.wait_ready()
        for url in engines.urls:
            tell(url)
        where = f"that of {TOKEN} in the environment" if TOKEN in os.environ else f"in {token_file(config)}"
        urls = json.dumps(engines.urls, separators=(",", ":"))  # as YAML takes those of IPv6, too
        say(f"for a run: engine.placement=external 'engine.urls={urls}'; the token is {where}")
        engines.run(asyncio.Event().wait())
