"""All engines of a run, behind one synchronous door."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import secrets
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from dapo_megatron.config import Config
from dapo_megatron.errors import ConfigError, EngineError, RefusedError
from dapo_megatron.measures import Measures
from dapo_megatron.rollout.adapter import adapter_for
from dapo_megatron.rollout.admission import Admission
from dapo_megatron.rollout.books import Books
from dapo_megatron.rollout.engine import Engine, Sampling
from dapo_megatron.rollout.lease import Hold, Tenant
from dapo_megatron.rollout.life import Life
from dapo_megatron.rollout.nodes import Nodes
from dapo_megatron.rollout.place import elsewhere, leader_address
from dapo_megatron.rollout.ports import reserve_port
from dapo_megatron.rollout.token import need_token
from dapo_megatron.rollout.watch import watch
from dapo_megatron.types import Completion, Prompt

T = TypeVar("T")

_BATCHES = 2
"""An engine has this many times the sequences that it decodes at once: the next ones are there when some end."""
_BACKOFF_SECONDS = 1.0
"""Before an engine is started again; twice as long each time."""

_RESET_SECONDS = 60.0
"""For an engine to be ready for another push after one that broke off, or it is started again, which takes longer."""
_LOOK_SECONDS = 1.0
"""How long a push waits for each engine that was started again."""

log = logging.getLogger(__name__)


class Engines:
    """Starts every engine and returns while they start; `wait_ready` before anything else. Those that run already
    (engine.urls) are not started: they are waited for, at the beginning and wherever others would be started again.

    Engines are spoken to in coroutines on one event loop. `sample` and `run` are the ways in from plain code, and watch
    over the engines meanwhile. `sample` starts engines that fail again; `run` fails with them. Iterates over the
    engines that take part in pushes of weights: all that are there.

    Args:
        config: the run.
        folder: where the engines write engine0.log, engine1.log, ...
        ranks: ranks on this machine, whose GPUs are not for engines; None asks torchrun's environment.
        at_once: False leaves starting them to `wait_ready`, which may never come.
        token: for all engines; None makes one for each that is started, and has `token.given_token` say that of others.
        nodes: where engines are started on other machines of the run, too.

    Attributes:
        refill: pushes the weights to all engines that are there. Called from within `sample` while none has the
            weights that it is to sample with; where there is nobody to push them, None.

    Raises:
        ConfigError: for a port in use, GPUs that are not there, or no token of engines that run already.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        *,
        ranks: int | None = None,
        at_once: bool = True,
        token: str | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        engine = config.engine
        _allow_connections()
        self.refill: Callable[[], None] | None = None
        self._config, self._folder, self._ranks = config, folder, ranks
        self._nodes, self._here = nodes, nodes.here if nodes else config
        self._token = token or (need_token(config) if engine.urls else None)
        kinds = [engine.kind_of(index) for index in range(engine.count)]
        adapters = {kind: adapter_for(config, kind) for kind in set(kinds)}
        self._adapters = [adapters[kind] for kind in kinds]
        self._holds = self._make_holds()
        self._runner = asyncio.Runner()
        self._lives: list[Life] = []
        self._failures = [0] * engine.count
        """Of each engine, since it last kept the weights of one push until the next."""
        self._books = Books(engine.count)
        self._version = 0
        self._pushed_to: list[Life] = []
        self._broken_off = False
        """Whether a push of the weights in use has broken off before."""
        self._admission = Admission(engine.count, _BATCHES * engine.max_sequences)
        if at_once:
            self._start()

    def _start(self) -> None:
        ports: list[socket.socket | None] = []
        try:
            ports += (self._reserve(index) for index in range(self._config.engine.count))
            self._lives += (self._begin(index, port) for index, port in enumerate(ports))
        except BaseException:
            for port in filter(None, ports):
                port.close()
            self._end()
            raise

    def _reserve(self, index: int) -> socket.socket | None:
        engine = self._config.engine
        if engine.urls or (self._nodes and index in self._nodes):
            return None
        return reserve_port(engine.host, engine.port + index if engine.port else 0)

    def _begin(self, index: int, port: socket.socket | None) -> Life:
        log = self._folder / f"engine{index}.log"
        hold = self._holds[index] if self._holds else None
        return Life(
            self._here, self._adapters[index], index, port, log, self._ranks, self._token, hold=hold, nodes=self._nodes
        )

    def _make_holds(self) -> list[Hold]:
        """What keeps other runs away from engines that run already."""
        owner = f"run {self._config.run.name}, process {os.getpid()} on {socket.gethostname()}"
        run, places = secrets.token_hex(8), range(len(self._config.engine.urls))
        engines = (elsewhere(self._config, index) for index in places)
        return [
            Hold(f"{place.name} ({place.url})", self._token or "", Tenant(run, owner, place.url)) for place in engines
        ]

    def __iter__(self) -> Iterator[Engine]:
        return (life.engine for life in self._lives if _is_there(life))

    @property
    def urls(self) -> list[str]:
        """Where the engines answer, in the order of their numbers."""
        return [life.url for life in self._lives]

    @property
    def address(self) -> str:
        """Of this machine, at which all engines reach it.

        Raises:
            ConfigError: as `leader_address`.
        """
        return leader_address(self._config.engine, self._nodes.addresses if self._nodes else ())

    @property
    def version(self) -> int:
        """Which weights are in use. Engines that were started again have older ones, until they get these."""
        return max([self._version, *(engine.version for engine in self)])

    def take_measures(self) -> Measures:
        """Return what was measured since the last call: restarts, and tokens a second of single engines."""
        return self._books.take()

    def waits(self) -> str:
        """Say what is waited for, in words. Can be called on any thread."""
        return self._books.waits()

    def expect(self, version: int) -> None:
        """Take note that the engines are about to get weights of this version, and are to sample with no others.

        Those that were started again and are there by now get them, too.
        """
        self._run(self._look())
        self._pushed_to = [life for life in self._lives if _is_there(life)]
        if version != self._version:
            kept = [self._can_sample(life) for life in self._lives]
            self._failures = [0 if well else count for well, count in zip(kept, self._failures, strict=True)]
            self._version, self._broken_off = version, False

    def recover(self, error: EngineError) -> None:
        """Get ready for another push after one that broke off. Engines may have any weights then, and sample with none.

        Where the push was broken off by an engine, that one is to be started again, and the others go back to where
        they can be pushed to. All are started again where it cannot be told whose fault it was, or those that were
        not seem to have had a part in it: where another push of the same weights breaks off.
        """
        there = self._pushed_to
        for life in there:
            if not life.server.alive:
                life.fail(error)
        # Others may wait for what one that hangs was to pass on.
        self._run(_gathered(life.close() for life in there if life.failure))
        if not self._broken_off:
            self.ask(lambda engine: _within(_RESET_SECONDS, engine, engine.reset(), "got ready for another push"))
        if self._broken_off or not any(life.failure for life in there):
            at_fault = [life for life in there if life.engine.name == error.engine and not self._broken_off]
            for life in at_fault or there:
                life.fail(error)
        self._broken_off = True
        if spared := [life.server.name for life in there if not life.failure]:
            log.warning("%s\na push broke off; %s can be pushed to again", error, ", ".join(spared))

    def ask(self, question: Callable[[Engine], Coroutine[Any, Any, T]]) -> list[T]:
        """Ask all engines that are there, at once. One that fails, or hangs, is of no use any more, and no other with
        it; `sample` starts it again.

        Returns:
            What the others answer.
        """
        there = [index for index, life in enumerate(self._lives) if life.ready]
        answers = self._run(_gathered(self._asked(index, question) for index in there))
        self._pushed_to = [life for life in self._pushed_to if not life.failure]
        return [answer for some in answers for answer in some]

    def wait_ready(self) -> None:
        """Block until every engine has written a token: some compile kernels when they are first asked for one.

        Starts them where that was left to this. Safe to call again.

        Raises:
            EngineError: when one dies, or is not there within engine.startup_seconds.
        """
        if not self._lives:
            self._start()
        self._run(self._come_up())

    def sleep(self, *, wait: bool = True) -> None:
        """Have all engines give up their memory, which somebody else is about to take. What they write is given up.

        One that fails, or has failed before, is ended; `sample` starts it again.

        Args:
            wait: for those that are about to start: otherwise they would measure memory that is not theirs. False ends
                them.
        """

        async def put_to_sleep(index: int) -> None:
            life = self._lives[index]
            if not (life.ready or wait):
                life.fail(EngineError(f"{life.server.name} was ended while it started"))
            await self._turn(index, lambda engine: engine.sleep())

        with self._books.turning("sleep"):
            self._run(_gathered(put_to_sleep(index) for index in range(len(self._lives))))

    def wake(self, *tags: str) -> None:
        """Have all engines that are there take memory again (`Engine.wake`). One that fails is ended, as in `sleep`."""
        there = [index for index, life in enumerate(self._lives) if life.ready]
        with self._books.turning("wake"):
            self._run(_gathered(self._turn(index, lambda engine: engine.wake(*tags)) for index in there))

    async def _turn(self, index: int, ask: Callable[[Engine], Coroutine[Any, Any, None]]) -> None:
        """Ask one engine, once it is there, and end it where it fails: it must not keep memory that others take."""
        life = self._lives[index]
        try:
            if not life.failure:
                await life.come_up()
        except EngineError as error:
            life.fail(error)
        await self._asked(index, ask)
        if life.failure:
            await life.close()

    async def _asked(self, index: int, question: Callable[[Engine], Coroutine[Any, Any, T]]) -> list[T]:
        """The answer of one engine; none, where it fails or has failed."""
        life = self._lives[index]
        try:
            return [] if life.failure else [await _first(life.with_it(question(life.engine)), self._watch(index))]
        except EngineError as error:
            life.fail(error)
            return []

    async def _look(self) -> None:
        for life in self._lives:
            with suppress(TimeoutError, EngineError):
                if not life.failure:
                    await asyncio.wait_for(life.come_up(), _LOOK_SECONDS)

    async def _come_up(self) -> None:
        await asyncio.gather(*(life.come_up() for life in self._lives))

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
        """Sample `n` responses as soon as an engine can take them, on the one with the least to do.

        Where that one fails, on another one, or on what becomes of it.
        """
        with self._books.asked(prompt.uid) as request:
            while True:
                async with self._admission.place(n) as request.engine:
                    index = request.engine
                    life = self._lives[index]
                    try:
                        completions = await life.with_it(_generate(life.engine, prompt, sampling, n))
                    except RefusedError:
                        raise
                    except EngineError as error:
                        life.fail(error)
                        # Whoever watches decides on what becomes of it, and of this if nothing does.
                        self._open()
                    else:
                        self._books.wrote(index, sum(completion.length for completion in completions))
                        return completions
                request.engine = None

    def run(self, work: Coroutine[Any, Any, T], /) -> T:
        """Run a coroutine to its end. What interrupts it, Ctrl-C for example, cancels the requests in flight.

        Raises:
            EngineError: when an engine fails, or hangs (`watch`), whatever the coroutine waits for.
        """
        return self._run(self._watched(work))

    def sample(self, work: Coroutine[Any, Any, T], /) -> T:
        """Run a coroutine that only asks for responses, as `run` does, and start engines that fail meanwhile again.

        Requests that an engine had are made again. An engine that was started again answers once it has the weights
        in use: with the next push, or `refill`, which is called where no other has them.

        Raises:
            EngineError: when an engine has failed more than engine.max_restarts times, and did not keep the weights
                of one push until the next meanwhile.
        """
        self._open()  # no longer to those that could sample when the last work ended
        main = self._run(_begun(work))
        with self._books.sampling():
            return self._sampled(main)

    def _sampled(self, main: asyncio.Task[T]) -> T:
        try:
            while not self._run(self._mended(main)):
                assert self.refill, "the engines have other weights than were pushed, and nobody pushes them"
                self._run(self._start_the_failed())
                self.refill()
            self._run(self._start_the_failed())
            return self._run(_result(main))
        finally:
            if not main.done():
                self._run(_cancel(main))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        results: list[T] = []

        async def keep() -> None:
            results.append(await work)

        kept = keep()

        try:
            # Not as the task's own result: on its way out the runner spells that, a rollout's tokens one by one.
            self._runner.run(kept)
            return results[0]
        except BaseException:
            # An exception out of a signal handler leaves the loop, but not the task on it. Others go on: those of a
            # rollout, in whose midst this may be a push.
            self._runner.run(_cancel_task_of(kept))
            raise

    async def _watched(self, work: Coroutine[Any, Any, T]) -> T:
        main = asyncio.ensure_future(work)
        watchers = {
            asyncio.ensure_future(life.with_it(self._watch(index))): life
            for index, life in enumerate(self._lives)
            if life.ready and not life.failure
        }
        try:
            await asyncio.wait([main, *watchers], return_when=asyncio.FIRST_COMPLETED)
            for watcher, life in watchers.items():
                if not main.done() and watcher.done() and isinstance(error := watcher.exception(), EngineError):
                    life.fail(error)
                    raise error
            return await main
        finally:
            await _cancel(main, *watchers)

    async def _mended(self, main: asyncio.Future[Any]) -> bool:
        """Keep the engines up until `main` is done, or can go on only with weights for one of them; False then."""
        self._open()
        keepers = [asyncio.ensure_future(self._keep(index)) for index in range(len(self._lives))]
        hungry = asyncio.ensure_future(self._hungry())
        try:
            await asyncio.wait([main, hungry, *keepers], return_when=asyncio.FIRST_COMPLETED)
            for keeper in keepers:
                if keeper.done() and not main.done():
                    keeper.result()
            return main.done()
        finally:
            await _cancel(hungry, *keepers)

    async def _keep(self, index: int) -> NoReturn:
        """Watch over an engine, and start it again when it fails."""
        while True:
            life = self._lives[index]
            try:
                if not life.failure:
                    await life.come_up()
                    self._open()
                    await life.with_it(self._watch(index))
            except EngineError as error:
                life.fail(error)
            self._open()
            if self._failures[index] >= self._config.engine.max_restarts:
                raise self._given_up(life)
            await life.close()
            await asyncio.sleep(_BACKOFF_SECONDS * 2 ** self._failures[index])
            self._start_again(index)

    def _start_again(self, index: int) -> None:
        life = self._lives[index]
        what = (
            "is not this run's to start: waiting until it answers" if self._config.engine.urls else "is started again"
        )
        log.warning("%s\n%s %s", life.failure, life.server.name, what)
        self._failures[index] += 1
        self._books.restarted()
        try:
            self._lives[index] = self._begin(index, self._reserve(index))
        except ConfigError as error:
            raise EngineError(f"{life.server.name} cannot be started again: {error}") from error

    async def _start_the_failed(self) -> None:
        """Start what failed near the end of a rollout, or in a push, so that it comes up while weights are made."""
        for index, life in enumerate(self._lives):
            if life.failure and self._failures[index] < self._config.engine.max_restarts:
                await life.close()
                self._start_again(index)

    def _given_up(self, life: Life) -> EngineError:
        most = self._config.engine.max_restarts
        again = "waited for" if self._config.engine.urls else "started again"
        count = f"it was {again} {most} times since it last kept its weights until the next push"
        how = count if most else "engine.max_restarts is 0"
        error = EngineError(f"{life.failure}\n{life.server.name} is given up: {how}")
        error.__cause__ = life.failure
        return error

    def _open(self) -> None:
        """Give work to the engines that have the weights in use, and to no others."""
        self._admission.open([index for index, life in enumerate(self._lives) if self._can_sample(life)])

    def _can_sample(self, life: Life) -> bool:
        return life.ready and not life.failure and life.engine.version == self._version

    async def _hungry(self) -> None:
        """Return when an engine is there, and none has the weights in use.

        Where memory is shared, once all are there: one that starts would find that taken that the actor needs to push.
        """
        while (
            not any(True for _ in self)
            or any(self._can_sample(life) for life in self._lives)
            or (self._config.engine.sleeps and any(life.failure or not life.ready for life in self._lives))
        ):
            await asyncio.sleep(0.1)

    async def _watch(self, index: int) -> NoReturn:
        life = self._lives[index]
        await watch(
            life.engine,
            life.server,
            self._config.engine.stall_seconds,
            writing=lambda: self._admission.held[index] > 0,
            seen=lambda progress: self._admission.finished(index, progress.finished),
        )

    def close(self) -> None:
        """End all engines. Safe to call twice."""
        lives, self._lives = self._lives, []
        try:
            if lives:
                self._runner.run(_close(lives))
        finally:
            for life in lives:
                with suppress(EngineError):  # it was told
                    life.end()
            self._end()

    def _end(self) -> None:
        for life in self._lives:
            life.end()
        for hold in self._holds:
            hold.let_go()
        for hold in self._holds:
            hold.close()
        self._runner.close()


async def _generate(engine: Engine, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
    completions = await engine.generate(prompt, sampling, n)
    if len(completions) != n or not all(completion.versions for completion in completions):
        raise EngineError(
            f"{engine.name}: asked for {n} responses to prompt {prompt.uid}, each with the versions that wrote "
            f"it, got {len(completions)}, {sum(not c.versions for c in completions)} of them without versions"
        )
    wrote = {span.version for completion in completions for span in completion.versions}
    if other := sorted(wrote - {engine.version}):
        raise EngineError(
            f"{engine.name} has answered prompt {prompt.uid} with weights of version {', '.join(map(str, other))}, and "
            f"got version {engine.version} last: it was started again elsewhere, or another run uses it, too"
        )
    return completions


def _is_there(life: Life) -> bool:
    return life.ready and not life.failure and life.server.alive


def _allow_connections() -> None:
    """Let this process have as many files as it may: every prompt that an engine works on has a connection."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _first(work: Coroutine[Any, Any, T], watcher: Coroutine[Any, Any, NoReturn]) -> T:
    """The result of `work`, unless the watcher fails before."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(watcher)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return (tasks[0] if tasks[0].done() else tasks[1]).result()
    finally:
        await _cancel(*tasks)


async def _within(seconds: float, engine: Engine, work: Awaitable[T], what: str) -> T:
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise EngineError(f"{engine.name} has not {what} within {seconds:g} s") from None


async def _gathered(steps: Iterable[Awaitable[T]]) -> list[T]:
    return await asyncio.gather(*steps)


async def _begun(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    return asyncio.ensure_future(work)


async def _result(main: asyncio.Future[T]) -> T:
    return await main


async def _close(lives: Sequence[Life]) -> None:
    await asyncio.gather(*(life.close() for life in lives))


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _cancel_task_of(work: Coroutine[Any, Any, Any]) -> None:
    await _cancel(*(task for task in asyncio.all_tasks() if task.get_coro() is work))
