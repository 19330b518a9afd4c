"""Puts the actor's weights to use in the engines: before every rollout, and when engines were started again.

Where actor and engines have GPUs in common and take turns with them (engine.sleep), neither has all of its own while
the other has:

    the actor trains          actor: all                   engines: nothing, they sleep
    the weights are pushed    actor: parameters            engines: weights
    engines sample            actor: nothing               engines: weights and KV cache

Whoever takes memory waits until whoever had it has given it up, on all ranks. With weights.verify=full there is one
moment more: the canary has the actor score what the engines answer, so that the KV cache wakes beside the parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from dapo_megatron.actor.actor import Actor
from dapo_megatron.errors import EngineError, StorageError, WeightsError
from dapo_megatron.heartbeat import Peers
from dapo_megatron.measures import Measure, Measures
from dapo_megatron.rollout.engine import KV_CACHE, WEIGHTS
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.stop import Stop, StopRequested
from dapo_megatron.weights.hf import HfCheckpoint
from dapo_megatron.weights.publish import Publisher

log = logging.getLogger(__name__)

Phase = Callable[[str], AbstractContextManager[None]]
_TO_PUSH = ("parameters",)
"""Of memory.offload, what a push needs."""


class Supply:
    """Every rank has one and makes the same calls.

    Args:
        engines: on the leader; None elsewhere.
        stop: whether the run is to end, which only the leader knows. Asked for where weights cannot be written: what is
            trained can be saved.
        in_turns: whether engines sleep while the actor trains (engine.sleep).
        phase: shows and measures what goes on inside (`Observer.phase`).
    """

    def __init__(
        self,
        publisher: Publisher,
        actor: Actor,
        hf: HfCheckpoint,
        peers: Peers,
        engines: Engines | None,
        stop: Stop,
        *,
        in_turns: bool = False,
        phase: Phase = nullcontext,
    ) -> None:
        self._publisher, self._actor, self._hf, self._peers = publisher, actor, hf, peers
        self._engines, self._version, self._stop = engines, 0, stop
        self._in_turns, self._phase = in_turns, phase
        self._verified: dict[str, Measure] = {}

    @contextmanager
    def sampling(self, version: int) -> Iterator[Measures]:
        """Have the engines sample with the actor's weights, as `version`, inside, and the actor back afterwards.

        Collective. Yields what `push` returns, and what it returns where it is made again inside; raises what it does.
        """
        yield self.hand_over(version)
        self._sleep(self._phase, heed_stop=True)
        self._actor.come_back(self._phase)

    def hand_over(self, version: int) -> Measures:
        """Begin as `sampling` does. For the last time in a run, after which the actor need not come back."""
        self._actor.leave(self._phase, keeping=_TO_PUSH)
        self._wake(WEIGHTS, phase=self._phase)
        with self._phase("publish"):
            self._verified = {**self.push(version)}
        self._actor.leave(self._phase)
        self._wake(WEIGHTS, KV_CACHE, phase=self._phase)
        return self._verified

    def push(self, version: int) -> Measures:
        """Put the actor's weights to use in all engines that are there, as `version`. Collective; the actor's
        parameters and the engines' memory for weights are there.

        Where one fails meanwhile, does not keep up, or gets something else than was sent, the push breaks off, that
        engine is to be started again, and the others get the weights `on_demand` (`Engines.recover`). Where the weights
        cannot be written, as on a full disk, or an engine samples with others all the same, the run is to save what is
        done, and stop: nothing of it was sampled so.

        Returns:
            On the leader, what was verified; nothing, where the push did not succeed.
        """
        self._version = version
        if self._engines:
            self._engines.expect(version)
        verified: Measures = {}
        try:
            chunks = self._actor.chunks  # on every rank: what is left to gather of a step is gathered here
            verified = self._publisher.push(self._hf.export(chunks) if self._hf.gathers else None, version)
        except (StorageError, WeightsError) as error:
            log.warning("%s; the run saves what is done and ends", error)
            self._stop.ask(f"error: {error}", error.exit_code)
        except EngineError as error:
            if not self._engines:
                raise
            with self._saved_where_it_fails():
                self._engines.recover(error)
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
        """In the middle of a rollout, in which no engine has anything to do."""
        self._sleep()
        self._actor.come_back(only=_TO_PUSH)
        self._wake(WEIGHTS)
        self._verified.update(self.push(self._version))
        self._actor.leave()
        self._wake(WEIGHTS, KV_CACHE)

    def _sleep(self, phase: Phase = nullcontext, *, heed_stop: bool = False) -> None:
        if not self._in_turns:
            return
        with phase("sleep"):
            if self._engines:
                with self._saved_where_it_fails():
                    self._put_to_sleep(self._engines, heed_stop)
            self._peers.after_leader("engines that sleep")

    def _put_to_sleep(self, engines: Engines, heed_stop: bool) -> None:
        if not heed_stop:
            engines.sleep()
            return
        try:
            with self._stop.interruptible():
                engines.sleep()
        except StopRequested:  # a run that stops waits for no engine that starts: its actor has to be saved
            engines.sleep(wait=False)

    @contextmanager
    def _saved_where_it_fails(self) -> Iterator[None]:
        """Around what only the leader does, while the others wait: an engine that cannot be ended stops the run."""
        try:
            yield
        except EngineError as error:
            self._stop.ask(f"error: {error}", error.exit_code)

    def _wake(self, *tags: str, phase: Phase = nullcontext) -> None:
        if not self._in_turns:
            return
        with phase("wake"):
            self._peers.together("memory for the engines")
            if self._engines:
                with self._saved_where_it_fails():
                    self._engines.wake(*tags)
            self._peers.after_leader("engines that wake")
