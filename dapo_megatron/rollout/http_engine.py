"""What engines have in common whose server answers at our endpoints (`rollout.endpoints`)."""

from __future__ import annotations

from dataclasses import asdict, replace

from pydantic import TypeAdapter

from dapo_megatron.errors import EngineError, RefusedError
from dapo_megatron.rollout.about import About
from dapo_megatron.rollout.answer import ABOUT, GENERATE, PROGRESS, decode
from dapo_megatron.rollout.client import Client
from dapo_megatron.rollout.engine import KV_CACHE, WEIGHTS, Progress, Sampling
from dapo_megatron.rollout.token import TOKEN
from dapo_megatron.types import Completion, Prompt, VersionSpan

_ABOUT = TypeAdapter(About)


class HttpEngine:
    """An `Engine` but for how it takes weights, and how it sleeps: it `keeps` none, where nothing else is said.

    Args:
        generation: for requests that take as long as responses do.
        transfer: for those that change weights. The model's process works on them, and the server answers meanwhile.
        control: for all others, which the server answers at once.
        workers: its processes that hold weights.
    """

    keeps = False

    def __init__(self, *, generation: Client, transfer: Client, control: Client, workers: int) -> None:
        self.name = control.name
        self.workers = workers
        self.version = control.server.version
        self._generation, self._transfer, self.control = generation, transfer, control
        self.asleep: frozenset[str] = frozenset()
        """What it has given up, of `engine.WEIGHTS` and `engine.KV_CACHE`. An engine has all of it when it starts."""

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
        version = self.version
        body = {"token_ids": prompt.token_ids, "n": n, **asdict(sampling)}
        what = f"generating for prompt {prompt.uid}"
        answer = await self._generation.fetch("POST", GENERATE, body, what=what)
        with self._generation.reading(answer, what):
            completions = decode(answer or b"")
        if len(completions) != n:
            raise EngineError(f"{self.name}: asked for {n} responses to prompt {prompt.uid}, got {len(completions)}")
        # Where it does not say which weights wrote a response, they are those that it had.
        return [c if c.versions else replace(c, versions=(VersionSpan(version, 0, c.length),)) for c in completions]

    async def progress(self) -> Progress:
        answer = await self.control.call("GET", PROGRESS)
        with self.control.reading(answer, PROGRESS):
            return Progress(**answer)

    async def about(self) -> About:
        try:
            answer = await self.control.fetch("GET", ABOUT)
        except RefusedError as error:
            raise RefusedError(
                f"{error}\nso this is no engine that `dapo-megatron engines` has started, or it has another token than "
                f"this run (engine.token_file, {TOKEN})"
            ) from error
        with self.control.reading(answer, ABOUT):
            return _ABOUT.validate_json(answer or b"", strict=True)

    async def sleep(self) -> None:
        if not self.asleep:
            await self._release()
            self.asleep = frozenset((WEIGHTS, KV_CACHE))

    async def wake(self, *tags: str) -> None:
        if wanted := self.asleep.intersection(tags):
            await self._resume(wanted)
            self.asleep -= wanted

    async def _release(self) -> None:
        """Have the server give up all."""
        raise NotImplementedError

    async def _resume(self, tags: frozenset[str]) -> None:
        """Have the server take memory again for `tags`, which are asleep, and sample if that is all it lacks."""
        raise NotImplementedError

    async def close(self) -> None:
        for client in (self._generation, self._transfer, self.control):
            await client.close()
