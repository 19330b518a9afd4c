"""A few steps of a run in this process: the loop of `train.train` with responses by a script in place of engines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from dapo_megatron.actor.topology import Topology
from dapo_megatron.config import Config
from dapo_megatron.measures import Measures
from dapo_megatron.preflight import Checked
from dapo_megatron.types import Completion, MiniBatch, Prompt, UpdateResult

Script = Callable[[Prompt, int], list[Completion]]
"""The responses to a prompt, as many as are asked for."""


@dataclass(frozen=True)
class Step:
    batch: Any
    mini_batches: Sequence[MiniBatch]
    """As the updates got them."""
    weighing: Measures
    results: Sequence[UpdateResult]


class Scripted:
    """Has the parts of `rollout.engines.Engines` that a rollout needs."""

    version = 0

    def __init__(self, script: Script) -> None:
        self._script = script

    def sample(self, work: Any) -> Any:
        return asyncio.run(work)

    async def generate(self, prompt: Prompt, sampling: object, n: int) -> list[Completion]:
        return self._script(prompt, n)


def mini_run(config: Config, topo: Topology, checked: Checked, script: Script, steps: int) -> list[Step]:
    """Train on rank `topo`, the only one. Weights go nowhere.

    Args:
        checked: what `preflight` read for this config.
    """
    from dapo_megatron.actor.actor import Actor
    from dapo_megatron.actor.architecture import attention_tokens
    from dapo_megatron.algo.objective import Objective
    from dapo_megatron.algo.weighing import weigh
    from dapo_megatron.data.stream import PromptStream
    from dapo_megatron.data.tokenizer import decoder
    from dapo_megatron.leader import Leader
    from dapo_megatron.reward.judge import Judge
    from dapo_megatron.rollout.engine import Sampling
    from dapo_megatron.state import Kept
    from dapo_megatron.stop import Stop
    from dapo_megatron.train import learning_rate, make_batch, receive
    from dapo_megatron.weights.hf import HfCheckpoint

    hf = HfCheckpoint(config.model.path)
    actor = Actor(config, topo, hf)
    reference = Actor(config, topo, hf, trainable=False) if config.algo.kl.coef else None
    objective, stop, done = Objective(config.algo), Stop(), []
    judge = Judge(config.reward, config.rollout.max_response_tokens, decoder(checked.tokenizer))
    leader: Any = SimpleNamespace(
        config=config,
        prompts=PromptStream(checked.train, config.train.seed),
        engines=Scripted(script),
        judge=judge,
        sampling=Sampling.from_config(config.rollout, checked.stop_token_ids),
        carried=Kept(tuple, ()),
        _attention_tokens=attention_tokens(checked.hf_config),
    )
    leader.pack = partial(Leader.pack, leader)
    with closing(judge):
        for step in range(steps):
            batch = make_batch(leader, topo.dp, step, stop)
            mini_batches, _ = actor.with_old_logprobs(receive(topo, batch, config.parallel))
            mini_batches, weighing = weigh(mini_batches, config.algo, topo)
            if reference:
                mini_batches = reference.with_ref_logprobs(mini_batches)
            rate = learning_rate(config.optimizer, step)
            results = [actor.update(mini_batch, objective, lr=rate) for mini_batch in mini_batches]
            done.append(Step(batch, mini_batches, weighing, results))
    return done
