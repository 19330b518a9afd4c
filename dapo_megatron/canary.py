"""A prompt that every engine answers before and after each push, to see that it uses the weights that it was sent.

Checksums end where an engine begins to cut, join and pack what has arrived, and know nothing of its caches. So the
actor scores the answers: where a log-prob differs by more than rounding, the run stops before it trains on such
responses. Before the push, a token is asked for, so that the engine has keys and values of the prompt by the old
weights, as of any prompt that comes again: one that still uses them gives itself away. An engine that has slept
meanwhile (engine.sleep) was asked after the push before; its KV cache wakes here, beside the actor's parameters.

Requests have their own seeds, and no prompt begins like the canary: the rollout is what it would be without it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, cycle, islice

import torch
from torch import Tensor

from dapo_megatron.actor.actor import Actor
from dapo_megatron.actor.topology import Topology
from dapo_megatron.config import Config
from dapo_megatron.errors import EngineError, WeightsError
from dapo_megatron.heartbeat import Peers
from dapo_megatron.leader import Leader
from dapo_megatron.measures import Max, Measures, Sum
from dapo_megatron.pack import Share
from dapo_megatron.rollout.engine import KV_CACHE, WEIGHTS, Engine, Sampling, request_seed
from dapo_megatron.rollout.server import UNKNOWN
from dapo_megatron.types import Completion, MiniBatch, Prompt, TrainSample
from dapo_megatron.weights.publish import Publisher

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Model's dtype -> nats by which log-probs may differ in the mean (weights.canary_tolerance)."""
_PROMPT_TOKENS = 144
"""More than a block of any prefix cache: vLLM's have 16 tokens on GPUs, and 128 on CPU."""
_TOKENS = 16
"""Of an answer."""


class Canary:
    """A `Publisher` that looks at the engines before and after each push of another one.

    Args:
        leader: on the leader, who has the engines, and packs what they answer.
        prompts: on the leader, those that are trained on: the canary is made of them, so that the model knows its kind.
    """

    def __init__(
        self,
        publisher: Publisher,
        config: Config,
        topo: Topology,
        actor: Actor,
        leader: Leader | None,
        prompts: Sequence[Prompt],
        peers: Peers,
    ) -> None:
        self._publisher, self._config, self._peers = publisher, config, peers
        self._topo, self._actor, self._leader = topo, actor, leader
        self._tolerance = config.weights.canary_tolerance or TOLERANCE[config.model.dtype]
        self._tokens = min(_TOKENS, config.max_sequence_tokens // 2)
        length = min(_PROMPT_TOKENS, config.max_sequence_tokens - self._tokens)
        self._asked: list[str] = []
        """On the leader, the engines that have answered last, in the order of the rows of `_apart`."""
        self._prompt, self._fresh = (_prompt(prompts, length, start) for start in (1, 2)) if leader else (None, None)

    def push(self, weights: Iterable[tuple[str, Tensor]] | None, version: int) -> Measures:
        """See `Publisher`.

        Raises:
            WeightsError: on the leader, where an engine's log-probs are not those of the weights.
        """
        began = time.monotonic()
        if self._leader and not self._config.engine.sleeps:
            # One that sleeps cannot be asked; the canary of the push before is in what it should have forgotten.
            self._leader.engines.ask(self._remember)
        asked = time.monotonic()
        measures: Measures = {}
        failure: EngineError | None = None
        try:
            measures = self._publisher.push(weights, version)
            if self._leader and self._config.engine.sleeps:
                self._leader.engines.wake(WEIGHTS, KV_CACHE)
        except EngineError as error:
            failure = error
        pushed = time.monotonic()
        apart = self._apart(self._prompt, version, failure)
        if apart is None:
            return measures
        if bool((apart[:, 0] > self._tolerance).any()):
            found = dict(zip(self._asked, apart.tolist(), strict=False))
            # Where the cache is stale, a prompt that it does not know tells.
            fresh = self._apart(self._fresh, version)
            if self._leader and fresh is not None:
                raise WeightsError(self._message(version, found, dict(zip(self._asked, fresh.tolist(), strict=False))))
        if not self._leader:
            return {}
        mean, largest = apart.amax(0).tolist()
        seconds = measures["seconds/verify"].value + asked - began + time.monotonic() - pushed
        canary = {"verify/canary": Max(mean), "verify/canary_max": Max(largest)}
        return {**measures, **canary, "seconds/verify": Sum(seconds)}

    def close(self) -> None:
        self._publisher.close()

    def _apart(self, prompt: Prompt | None, version: int, failure: EngineError | None = None) -> Tensor | None:
        """Have every engine answer and the actor score the answers. Collective.

        An engine that does not answer, or by other weights than those of `version`, is to be started again.

        Args:
            failure: on the leader, why there is nothing to ask for: raised once the others know.

        Returns:
            float32 [engines, 2], the same on all ranks: |difference| of log-probs in nats, mean and largest, of those
            `_asked`; 0 in the rows of engines that are not there. None where the leader has a failure, or no engine is
            there.
        """
        answers: dict[str, Completion] = {}
        if self._leader and not failure:
            answers = dict(self._leader.engines.ask(partial(self._named_answer, prompt, version)))
            self._asked = list(answers)
        if not self._peers.leader_says("canary", bool(answers)):
            if failure:
                raise failure
            return None
        packed = None
        if self._leader:
            samples = [_sample(prompt, answer, index) for index, answer in enumerate(answers.values())]
            packed, _ = self._leader.pack(samples, self._topo.dp, version)
        parallel = self._config.parallel
        share = Share(*self._topo.scatter(packed.share if packed else None))
        mini_batches, _ = self._actor.with_old_logprobs(
            share.mini_batches(sequence_multiple=parallel.sequence_multiple, total_multiple=parallel.total_multiple)
        )
        return self._topo.max(differences(mini_batches, self._config.engine.count))

    async def _remember(self, engine: Engine) -> None:
        """Have an engine know the canary by the weights that it has."""
        if engine.version != UNKNOWN:  # otherwise they may be half of a push, and the answer not even numbers
            await self._answer(engine, self._prompt, 1)

    async def _named_answer(self, prompt: Prompt | None, version: int, engine: Engine) -> tuple[str, Completion]:
        answer = await self._answer(engine, prompt, self._tokens)
        if any(span.version != version for span in answer.versions):
            raise EngineError(f"{engine.name} answers with {answer.versions} after a push of version {version}")
        return engine.name, answer

    async def _answer(self, engine: Engine, prompt: Prompt | None, tokens: int) -> Completion:
        assert prompt
        config, limit = self._config, self._config.weights.push_seconds
        sampling = Sampling(
            # The actor's log-probs are those of the whole distribution at this temperature.
            temperature=config.rollout.temperature,
            top_p=1.0,
            max_tokens=tokens,
            stop_token_ids=(),
            seed=request_seed(config.sampling_seed, prompt.uid, 0, prompt.uid),
        )
        try:
            async with asyncio.timeout(limit):
                (answer,) = await engine.generate(prompt, sampling, 1)
                return answer
        except TimeoutError:
            raise EngineError(
                f"{engine.name} has not answered the canary within {limit:g} s (weights.push_seconds)"
            ) from None

    def _message(self, version: int, apart: Mapping[str, list[float]], fresh: Mapping[str, list[float]]) -> str:
        """Of engines by name: how far they are apart at the canary, and at a prompt that no cache knows."""
        wrong = [name for name, (mean, _) in apart.items() if mean > self._tolerance]
        stale = [name for name in wrong if name in fresh and fresh[name][0] <= self._tolerance]
        found = "; ".join(
            f"{name}: {mean:.3g} in the mean, {largest:.3g} at most" for name, (mean, largest) in apart.items()
        )
        if stale == wrong:
            what = "has answered with cached keys and values of the old weights"
            advice = "its prefix cache was not emptied by the push: a prompt that it has not seen gets the right answer"
        else:
            what = "does not use the weights that it was sent"
            others = "all engines are off: look at the model's config and dtype on both sides, and at mismatch/* so far"
            one = "others are right: look at the log of this one"
            advice = others if len(wrong) == len(apart) else one
        return (
            f"{', '.join(wrong)} {what}, after the push of version {version}. Of "
            f"{self._tokens} tokens of a canary prompt, log-probs differ from the actor's by, in nats: {found}. "
            f"{self._tolerance:g} in the mean is taken for rounding (weights.canary_tolerance); {advice}"
        )


def differences(mini_batches: Iterable[MiniBatch], engines: int) -> Tensor:
    """Compare the log-probs of engine and trainer in the samples that are here; each has its engine's index as group.

    Returns:
        float32 [engines, 2]: mean and largest |difference|; 0 where there is no sample of the engine.
    """
    found = torch.zeros(engines, 2)
    for batch in (batch for mini_batch in mini_batches for batch in mini_batch.micro_batches):
        assert batch.old_logprobs_T is not None
        apart_T = (batch.old_logprobs_T - batch.rollout_logprobs_T).abs()
        for index, start, end in zip(batch.groups_S.tolist(), batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            if index >= 0:
                own = apart_T[start:end][batch.loss_mask_T[start:end]]
                found[index] = torch.stack([own.mean(), own.max()])
    return found


def _prompt(prompts: Sequence[Prompt], length: int, start: int) -> Prompt:
    """Return the tokens of `prompts` end to end, over and over, from token `start` on.

    From the second one at the earliest: where a prompt began like the canary, its beginning would be in the engine's
    cache. On CPU, its last bits would be others then.
    """
    tokens = chain.from_iterable(prompt.token_ids for prompt in prompts[: length + start])
    return Prompt("canary", tuple(islice(cycle(tokens), start, start + length)), text="", answer="")


def _sample(prompt: Prompt | None, answer: Completion, engine: int) -> TrainSample:
    assert prompt
    before = len(prompt.token_ids)
    return TrainSample(
        token_ids=torch.cat([torch.tensor(prompt.token_ids, dtype=torch.int32), torch.from_numpy(answer.token_ids)]),
        loss_mask=torch.arange(before + answer.length) >= before,
        rollout_logprobs=torch.cat([torch.zeros(before), torch.from_numpy(answer.logprobs)]),
        advantage=0.0,
        group=engine,
    )
