"""Engines on other machines of the run: the end of the rank that starts them. `rollout.nodes` has the letters."""

from __future__ import annotations

import queue
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dapo_megatron.config import Config
from dapo_megatron.errors import DapoError
from dapo_megatron.rollout.adapter import EngineAdapter, adapter_for
from dapo_megatron.rollout.life import start_server
from dapo_megatron.rollout.nodes import Mail, with_share
from dapo_megatron.rollout.place import Place, place, seed_of
from dapo_megatron.rollout.ports import reserve_port
from dapo_megatron.rollout.server import StartedServer
from dapo_megatron.routes import address_for

_LOOK_SECONDS = 0.1
"""Between two looks whether engines are alive."""
_LOG_SECONDS = 1.0
"""Between two reports of an engine's log."""
_SAYS_CHARACTERS = 8_000


def introduce(mail: Mail, local_rank: int) -> None:
    """Say to the leader which rank of its machine this is. Every other rank does, before anything else is posted."""
    mail.post(0, {"local_rank": local_rank, "host": socket.gethostname()})


@dataclass(slots=True)
class _Life:
    server: StartedServer
    log_bytes: int = -1
    reported: float = 0.0


class NodeEngines:
    """Starts and ends engines of this machine as the leader asks, in a thread, and tells it what becomes of them.

    They have guards that hold a pipe to this process, so that they end with it.

    Args:
        config: the run.
        mail: the way to the leader.
        check: raises ConfigError where the engines of a config, which has this machine's share of engine.count and its
            address as engine.host, cannot be started beside the ranks of this machine.
        master: the name or address at which all ranks meet (MASTER_ADDR).
        ranks: of this machine.
    """

    def __init__(
        self, config: Config, mail: Mail, check: Callable[[Config], object], *, master: str, ranks: int
    ) -> None:
        self._config, self._mail, self._check = config, mail, check
        self._master, self._ranks, self._host = master, ranks, socket.gethostname()
        self._here = config
        self._adapter: EngineAdapter | None = None
        self._ports: list[socket.socket] = []
        """Kept as long as this lives: an engine that is started again has the port that it had."""
        self._places: dict[int, Place] = {}
        self._lives: dict[int, _Life] = {}
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._work, name="engines of this node", daemon=True).start()

    def close(self) -> None:
        """End all engines. Safe to call twice."""
        with self._lock:
            self._closed = True
            lives = [*self._lives]
        with ThreadPoolExecutor(max(1, len(lives))) as pool:
            list(pool.map(self._end, lives))
        for port in self._ports:
            port.close()

    def _work(self) -> None:
        while True:
            try:
                _, letter = self._mail.letters.get(timeout=_LOOK_SECONDS if self._lives else None)
            except queue.Empty:
                self._look()
                continue
            match letter:
                case None:  # the leader is gone, and this rank will be
                    return
                case {"engines": indices}:
                    self._mail.post(0, self._prepare(indices))
                case {"start": life, "engine": index, "token": token}:
                    self._start(life, index, token)
                case {"end": life}:
                    # Each in a thread: an engine has seconds to end, and the others are looked after meanwhile.
                    threading.Thread(target=self._end, args=[life], daemon=True).start()

    def _prepare(self, indices: Sequence[int]) -> dict[str, Any]:
        try:
            address = address_for([self._master]).pop()
            self._here = with_share(self._config, len(indices), address)
            self._check(self._here)
            self._adapter = adapter_for(self._here, self._here.engine.kind)
            first = self._here.engine.port
            for slot, index in enumerate(indices):
                port = reserve_port(address, first + slot if first else 0)
                self._ports.append(port)
                where = place(self._here, slot, port.getsockname()[1], self._ranks)
                self._places[index] = replace(where, index=index, seed=seed_of(self._config, index))
        except DapoError as error:
            return {"refused": str(error)[-_SAYS_CHARACTERS:]}
        except Exception:  # whatever it is, the leader is waiting for an answer
            return {"refused": traceback.format_exc()[-_SAYS_CHARACTERS:]}
        places = [self._places[index] for index in indices]
        return {
            "ranks": self._ranks,
            "address": address,
            "ports": [where.port for where in places],
            "gpus": [where.gpus for where in places],
        }

    def _start(self, life: int, index: int, token: str) -> None:
        where, log = self._places[index], self._log(index)
        try:
            with self._lock:
                if self._closed:
                    return
                assert self._adapter
                name = f"{where.name} on {self._host}"
                server = start_server(self._here, self._adapter, where, log, token, name)
                self._lives[life] = _Life(server)
        except Exception as error:  # whatever it is, the leader is waiting for this engine
            self._tell(life, False, f"{where.name} on {self._host} cannot be started: {error!r}")
            return
        self._tell(life, True, _account(server))

    def _log(self, index: int) -> Path:
        return self._config.run.folder / f"engine{index}.log"

    def _look(self) -> None:
        with self._lock:
            lives = [*self._lives.items()]
        for number, life in lives:
            if not life.server.alive:
                self._end(number)
                continue
            with suppress(OSError):  # somebody has removed it
                size = life.server.log.stat().st_size
                if size != life.log_bytes and time.monotonic() - life.reported > _LOG_SECONDS:
                    life.log_bytes, life.reported = size, time.monotonic()
                    self._tell(number, True, _account(life.server))

    def _end(self, number: int) -> None:
        """End an engine, or what is left of it, and say so."""
        with self._lock:
            life = self._lives.pop(number, None)
        if life is None:  # it has ended, and that was told
            return
        try:
            life.server.close()
        except DapoError as error:
            self._tell(number, True, str(error))
            return
        self._tell(number, False, _account(life.server))

    def _tell(self, life: int, alive: bool, says: str) -> None:
        half = _SAYS_CHARACTERS // 2
        says = says if len(says) <= _SAYS_CHARACTERS else f"{says[:half]} ... {says[-half:]}"
        self._mail.post(0, {"life": life, "alive": alive, "says": says})


def _account(server: StartedServer) -> str:
    try:
        return server.describe()
    except OSError as error:
        return f"{server.name}: its log cannot be read: {error}"
