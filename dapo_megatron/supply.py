"""Puts the actor's weights to use in the engines: after every step, and when engines were started again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from dapo_megatron.actor.actor import Actor
from dapo_megatron.errors import EngineError, StorageError, WeightsError
from dapo_megatron.heartbeat import Peers
from dapo_megatron.measures import Measures
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.stop import Stop
from dapo_megatron.weights.hf import HfCheckpoint
from dapo_megatron.weights.publish import Publisher

log = logging.getLogger(__name__)


class Supply:
    """Every rank has one and makes the same calls.

    Args:
        engines: on the leader; None elsewhere.
        stop: asked on the leader, where weights cannot be written: what is trained can be saved.
    """

    def __init__(
        self, publisher: Publisher, actor: Actor, hf: HfCheckpoint, peers: Peers, engines: Engines | None, stop: Stop
    ) -> None:
        self._publisher, self._actor, self._hf, self._peers = publisher, actor, hf, peers
        self._engines, self._version, self._stop = engines, 0, stop

    def push(self, version: int) -> Measures:
        """Put the actor's weights to use in all engines that are there, as `version`. Collective.

        Where one fails meanwhile, does not keep up, or gets something else than was sent, all are to be started again,
        and get the weights `on_demand`. Where the weights cannot be written, as on a full disk, the run is to stop.

        Returns:
            On the leader, what was verified; nothing, where the push did not succeed.

        Raises:
            WeightsError: on the leader, where an engine samples with other weights all the same.
        """
        self._version = version
        if self._engines:
            self._engines.expect(version)
        verified: Measures = {}
        try:
            chunks = self._actor.chunks  # on every rank: what is left to gather of a step is gathered here
            verified = self._publisher.push(self._hf.export(chunks) if self._hf.gathers else None, version)
        except WeightsError:
            raise
        except StorageError as error:
            log.warning("%s; the run saves what is done and ends", error)
            self._stop.ask(f"error: {error}", error.exit_code)
        except EngineError as error:
            if not self._engines:
                raise
            self._engines.fail(error)
        self._peers.after_leader("publish")
        return verified

    @contextmanager
    def on_demand(self, stop: Stop) -> Iterator[None]:
        """While the leader samples, inside, give the weights to engines that were started again. Collective.

        They get them where no other engine has them; otherwise those that have go on, and the others wait for `push`.
        """

        def ask() -> None:
            with stop.uninterruptible():
                self._peers.leader_says("weights on demand", True)
                self._push_again()

        if self._engines:
            self._engines.refill = ask
        yield
        while self._peers.leader_says("weights on demand", False):
            self._push_again()
        if self._engines:
            self._engines.refill = None

    def _push_again(self) -> None:
        with self._actor.back():
            self.push(self._version)
