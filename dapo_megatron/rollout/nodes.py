"""Engines on other machines of the run: the leader's end.

The first rank of each node that is to have engines starts them (`rollout.node`), as the leader asks, and is the process
that they end with. The two write letters to one another, over the connection that ranks have with the leader anyway:

    {"local_rank": 4, "host": "node7"}                      from every rank: which rank of which machine it is
    {"engines": [2, 3]}                                     to the first rank of a node: which ones it is to have
    {"ranks": 4, "address": "10.0.0.2", "ports": [8000, 8001], "gpus": [["4"], ["5"]]}
                                                            its answer: where they will be
    {"refused": "engine: ..."}                              or why that cannot be
    {"start": 7, "engine": 2, "token": "5c1f..."}           to it: begin life 7, one of engine 2
    {"end": 7}                                              to it
    {"life": 7, "alive": true, "says": "engine 2 on ..."}   from it, when that has changed: what `Server` has
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dapo_megatron.config import Config, EngineConfig
from dapo_megatron.errors import ConfigError, DapoError, EngineError
from dapo_megatron.rollout.place import Place
from dapo_megatron.rollout.server import UNKNOWN
from dapo_megatron.rollout.token import make_token

_CLOSE_SECONDS = 15.0
"""For a node to end an engine, which has less time there (`server.StartedServer`)."""


class Mail(Protocol):
    """Letters between the leader and the other ranks (`heartbeat.Peers`)."""

    letters: queue.SimpleQueue[tuple[int, Any]]
    """Each with the rank that sent it. The last of a rank is None."""

    def post(self, rank: int, letter: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the run, other than the leader's, that has engines."""

    number: int
    """Counts nodes in the order of their ranks; 0 is the leader's."""
    rank: int
    """Its first, which starts the engines."""
    host: str
    address: str
    """At which its engines answer."""
    ranks: int
    """How many it has."""
    places: tuple[Place, ...]
    """Of its engines."""

    @property
    def name(self) -> str:
        return f"node {self.number}, {self.host}"


def shares(engine: EngineConfig, nodes: int) -> list[int]:
    """How many engines each of the run's nodes has.

    >>> shares(EngineConfig(nodes=[1, 2], count=4), nodes=3)
    [0, 2, 2]

    Raises:
        ConfigError: where engine.nodes names one that is not there, or cannot share out engine.count.
    """
    chosen = list(range(nodes)) if engine.nodes == "all" else engine.nodes
    if missing := [number for number in chosen if number >= nodes]:
        there = "node 0 alone" if nodes == 1 else f"{nodes} nodes, 0 to {nodes - 1}"
        raise ConfigError(
            f"engine.nodes names {', '.join(map(str, missing))}, but this run has {there}, each a machine with "
            f"ranks; start ranks on more machines (torchrun --nnodes), or choose others"
        )
    if engine.count % len(chosen):
        raise ConfigError(
            f"engine.count({engine.count}) / {len(chosen)} nodes (engine.nodes={engine.nodes}) = "
            f"{engine.count / len(chosen):.3g} engines on each, which is not whole; choose a multiple of {len(chosen)}"
        )
    return [engine.count // len(chosen) if number in chosen else 0 for number in range(nodes)]


def with_share(config: Config, count: int, host: str | None = None) -> Config:
    """The config of a machine that has so many of the engines, at `host` where that is given."""
    changed: dict[str, Any] = {"count": count} | ({"host": host} if host else {})
    return config.model_copy(update={"engine": config.engine.model_copy(update=changed)})


class Nodes:
    """The machines of the run that engines can be started on, for the leader.

    Args:
        mail: the way to the other ranks. Each of them calls `node.introduce`, and the first of each machine has
            `node.NodeEngines`.
        seconds: limit on an answer of the other ranks.

    Attributes:
        count: nodes of the run.
        here: the config with the leader's machine's share of engine.count.
        others: the other nodes that have engines.

    Raises:
        ConfigError: where engines cannot be where engine.nodes has them, in the words of the first node that says so.
        DapoError: where another rank does not answer.
    """

    def __init__(self, mail: Mail, config: Config, world_size: int, seconds: float) -> None:
        self._mail, self._seconds = mail, seconds
        self._lives: dict[int, ServerOnNode] = {}
        self._numbers = itertools.count()
        self._gone: set[int] = set()
        """Ranks that have left."""
        self._lock = threading.Lock()
        hosts = self._answers(range(1, world_size))
        firsts = [(rank, str(said["host"])) for rank, said in sorted(hosts.items()) if said["local_rank"] == 0]
        self.count = 1 + len(firsts)
        self._shares = shares(config.engine, self.count)
        self._config = config
        self.here = with_share(config, self._shares[0])
        self.others = self._settle(firsts)
        self._places = {place.index: (node, place) for node in self.others for place in node.places}
        threading.Thread(target=self._listen, name="engines of other nodes", daemon=True).start()

    def __contains__(self, index: int) -> bool:
        """Whether engine `index` is another node's."""
        return index in self._places

    @property
    def addresses(self) -> list[str]:
        return [node.address for node in self.others]

    def place(self, index: int) -> Place:
        return self._places[index][1]

    def share(self, number: int) -> str:
        """Say how many engines a node has, and why."""
        nodes = sum(share > 0 for share in self._shares)
        count = self._config.engine.count
        return f"node {number} has engine.count({count}) / {nodes} nodes = {self._shares[number]} engines"

    def start(self, index: int, ready: Callable[[], bool]) -> ServerOnNode:
        """Have engine `index` started on its node.

        Args:
            ready: holds once it answers.
        """
        node, place = self._places[index]
        with self._lock:
            life = next(self._numbers)
            server = self._lives[life] = ServerOnNode(self._mail, node, place, life, ready)
            if node.rank in self._gone:
                server.left(node.rank)
        self._mail.post(node.rank, {"start": life, "engine": index, "token": server.token})
        return server

    def _settle(self, firsts: Sequence[tuple[int, str]]) -> tuple[Node, ...]:
        """Tell nodes which engines they have, and hear where these will be."""
        indices = iter(range(self._shares[0], self._config.engine.count))
        asked: dict[int, list[int]] = {}
        for number, (rank, _) in enumerate(firsts, start=1):
            if mine := list(itertools.islice(indices, self._shares[number])):
                asked[rank] = mine
                self._mail.post(rank, {"engines": mine})
        said = self._answers(asked)
        return tuple(
            self._node(number, rank, host, asked[rank], said[rank])
            for number, (rank, host) in enumerate(firsts, start=1)
            if rank in asked
        )

    def _node(self, number: int, rank: int, host: str, indices: list[int], said: dict[str, Any]) -> Node:
        if "refused" in said:
            raise ConfigError(f"engine.nodes: {self.share(number)}, and rank {rank} on {host} says: {said['refused']}")
        where = zip(indices, said["ports"], said["gpus"], strict=True)
        sleeps = self._config.engine.sleeps
        places = [Place(index, said["address"], port, tuple(gpus), 0.0, 0, sleeps) for index, port, gpus in where]
        return Node(number, rank, host, said["address"], int(said["ranks"]), tuple(places))

    def _answers(self, ranks: Sequence[int] | dict[int, Any]) -> dict[int, dict[str, Any]]:
        """The next letter of each of `ranks`."""
        deadline = time.monotonic() + self._seconds
        said: dict[int, dict[str, Any]] = {}
        while late := [rank for rank in ranks if rank not in said]:
            try:
                rank, letter = self._mail.letters.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise DapoError(
                    f"engine.nodes: rank {late[0]} did not say within launch.join_seconds({self._seconds:g}) where "
                    f"engines of its machine can be; do all ranks have the same config?"
                ) from None
            if letter is not None:  # whoever is lost, the heartbeat tells
                said[rank] = letter
        return said

    def _listen(self) -> None:
        ranks = {node.rank for node in self.others}
        while ranks - self._gone:
            rank, letter = self._mail.letters.get()
            with self._lock:
                if letter is None:
                    self._gone.add(rank)
                    for life in self._lives.values():
                        life.left(rank)
                elif life := self._lives.get(letter["life"]):
                    life.heard(bool(letter["alive"]), str(letter["says"]))
                    if not letter["alive"]:
                        del self._lives[letter["life"]]


class ServerOnNode:
    """A `Server` on the machine of another node, whose first rank starts it, watches it, and ends it.

    Raises:
        EngineError: from `ready` and `check`, with what the node says of it.
    """

    run = ""  # no other has its token
    version = UNKNOWN  # model.path is another machine's

    def __init__(self, mail: Mail, node: Node, place: Place, life: int, ready: Callable[[], bool]) -> None:
        self.name, self.token = f"{place.name} on {node.host}", make_token()
        self._mail, self._node, self._url, self._life, self._ready = mail, node, place.url, life, ready
        self._began = time.monotonic()
        self._says = f"{self.name}: rank {node.rank} has not said anything of it"
        self._ended = threading.Event()
        self._closed = False

    @property
    def alive(self) -> bool:
        return not self._ended.is_set()

    def heard(self, alive: bool, says: str) -> None:
        """Take note of what the node says."""
        self._says = says
        if not alive:
            self._ended.set()

    def left(self, rank: int) -> None:
        """Take note that a rank is gone, and the engines that it has started with it."""
        if rank == self._node.rank and self.alive:
            self.heard(False, f"{self.name} is gone: the connection to rank {rank}, which it ends with, broke off")

    def ready(self, timeout_seconds: float) -> bool:
        if self._ready():
            self.check()
            return True
        self.check()
        if time.monotonic() - self._began > timeout_seconds:
            raise EngineError(
                f"{self.name} did not answer at {self._url} within {timeout_seconds:g} s (engine.startup_seconds); is "
                f"it still starting, or does a firewall keep this machine from there?\n{self.describe()}"
            )
        return False

    def check(self) -> None:
        if not self.alive:
            raise EngineError(self.describe())

    def describe(self) -> str:
        return self._says

    def close(self) -> None:
        if not self._closed and self.alive:
            self._closed = True
            self._mail.post(self._node.rank, {"end": self._life})
            if not self._ended.wait(_CLOSE_SECONDS):
                raise EngineError(f"{self.name} did not end within {_CLOSE_SECONDS:g} s\n{self.describe()}")
