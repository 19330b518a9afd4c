"""What the trainer asks of a rollout engine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dapo_megatron.config import RolloutConfig
from dapo_megatron.rollout.about import About
from dapo_megatron.types import Completion, Prompt

WEIGHTS, KV_CACHE = "weights", "kv_cache"
"""What engines that sleep have given up, by the names that vLLM and SGLang have for it."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample a response.

    >>> Sampling(temperature=1.0, top_p=1.0, max_tokens=20_480, stop_token_ids=(151_645, 151_643)).max_tokens
    20480
    """

    temperature: float
    """0 is greedy. Log-probs are those of the distribution at this temperature."""
    top_p: float
    max_tokens: int
    """Cap on generated tokens, the end token included."""
    stop_token_ids: tuple[int, ...]
    """These tokens end a response, and no others."""
    seed: int | None = None
    """Below 2**62. With the weights, it decides on the responses to a prompt: neither what else an engine has to do nor
    what it did before matters, nor which engine it is, as far as its kernels go. Each response has a stream of its own,
    so that n + 1 of them are n and another one. None is for what need not come twice; greedy sampling ignores it."""

    @classmethod
    def from_config(cls, config: RolloutConfig, stop_token_ids: Sequence[int]) -> Sampling:
        """`stop_token_ids`: the tokenizer's end tokens together with those of the config."""
        return cls(config.temperature, config.top_p, config.max_response_tokens, tuple(stop_token_ids))


def request_seed(seed: int, step: int | str, place: int, uid: str) -> int:
    """Return the seed of the responses to one prompt, below 2**62.

    A hash, because seeds made by adding would give neighbours each other's streams: engines count on from it for the
    responses to a prompt.

    >>> request_seed(0, 3, 17, "train.jsonl:12")
    154601940791279214

    Args:
        seed: that of the run's sampling.
        step: the step, or what else the responses are for.
        place: of the prompt among those drawn for that, from 0: where an epoch ends, a prompt can be drawn twice.
        uid: the prompt's.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{place}/{uid}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an engine is with what it has been asked to write. It changes with every token."""

    tokens: int
    """Tokens of all unfinished responses."""
    finished: int
    """Responses that have ended while others to the same prompt go on."""


class Responder(Protocol):
    """Whatever writes responses: one engine, or all of them."""

    @property
    def version(self) -> int:
        """The weights in use, as `Engine.finish_transfer` was told; before the first transfer, as `Server.version`."""
        ...

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
        """Sample `n` responses."""
        ...


class Engine(Responder, Protocol):
    """A copy of the policy that samples, in processes of its own. Every method raises EngineError when it fails."""

    @property
    def name(self) -> str: ...

    @property
    def workers(self) -> int:
        """Processes that hold the weights, each of which takes part in every transfer."""
        ...

    @property
    def keeps(self) -> bool:
        """Whether tensors can be left out of a transfer that it has already. One that sleeps has forgotten them."""
        ...

    async def progress(self) -> Progress:
        """Look at how far it is. Answers at once whatever else goes on, and costs the engine next to nothing."""
        ...

    async def about(self) -> About:
        """What it serves. Asked of engines that were not started for this run."""
        ...

    async def reset(self) -> None:
        """Be as an engine that has just started, whatever a push or another run has left it in the middle of. Only
        nobody knows which weights it has (`version`)."""
        ...

    async def join_group(self, info: dict[str, Any]) -> None:
        """Join the group through which weights come: before the first transfer, and anew after engines have changed."""
        ...

    async def begin_transfer(self) -> None:
        """Stop decoding and get ready for weights."""
        ...

    async def receive(self, info: dict[str, Any]) -> None:
        """Receive the tensors that `info` announces. Returns when they are in place."""
        ...

    async def finish_transfer(self, version: int) -> None:
        """Put the weights to use as `version`, forget what was cached under the old ones, go on decoding."""
        ...

    async def sleep(self) -> None:
        """Give up the memory of weights and KV cache, and forget what was in them (engine.sleep). What is being written
        is given up; until it is awake, nothing is asked of it but what `wake` allows."""
        ...

    async def wake(self, *tags: str) -> None:
        """Take memory again: for `WEIGHTS`, to receive some, and then for the `KV_CACHE`, to sample. What is awake
        already stays as it is."""
        ...

    async def close(self) -> None:
        """Let go of the connection. The processes are ended by whoever started them."""
        ...
