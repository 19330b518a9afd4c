"""What one rank does: all mini-batches in one layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dapo_megatron.actor import topology
from dapo_megatron.actor.actor import Actor, TokenCountError
from dapo_megatron.actor.topology import Replicas, Topology
from dapo_megatron.algo.objective import DapoLoss
from dapo_megatron.algo.sampler import weigh
from dapo_megatron.check_reduction.miniature import MiniBatch
from dapo_megatron.check_reduction.reference import worst
from dapo_megatron.config import Config
from dapo_megatron.pack import pack
from dapo_megatron.types import Update
from dapo_megatron.weights.hf import HfCheckpoint

FIRST_RATIO = "first ratio"
TWO_STEPS = "two steps"


@dataclass(frozen=True, slots=True)
class Job:
    """One layout, one model."""

    config: Config
    """With the miniature's path and the layout's sizes."""
    cases: tuple[MiniBatch, ...]
    answers: Path
    """File of torch.save: {case or TWO_STEPS: {name: float64}}, and {"loss": {case: float64 0-d}}."""
    steps: tuple[int, int]
    """Which cases the two optimizer steps are made with."""


@dataclass(frozen=True, slots=True)
class Finding:
    """How one mini-batch came out."""

    split: str
    micro_batches: int
    """Of each rank."""
    error: float
    """Largest difference relative to the largest entry of its parameter; inf where there is no number."""
    where: str
    """The parameter, or what went wrong."""


def check(job: Job) -> list[Finding]:
    """Collective over the ranks of the layout; only the leader's answer has numbers."""
    topo = topology.initialize(job.config.parallel)
    try:
        return _Check(job, topo).findings()
    finally:
        topology.shutdown()


class _Check:
    def __init__(self, job: Job, topo: Topology) -> None:
        self._job, self._topo = job, topo
        self._checkpoint = HfCheckpoint(job.config.model.path)
        self._actor = Actor(job.config, topo, load_weights=self._checkpoint.load)
        self._loss = DapoLoss(job.config.algo)
        self._answers: dict[str, dict[str, Tensor]] = torch.load(job.answers, weights_only=True)

    def findings(self) -> list[Finding]:
        found = [self._measured(case.name, case, self._gradient) for case in self._job.cases]
        first, second = (self._job.cases[index] for index in self._job.steps)
        found.append(self._measured(FIRST_RATIO, first, self._first_ratio))
        found.append(self._measured(TWO_STEPS, first, lambda case, update: self._two_steps(update, second)))
        return found

    def _measured(self, split: str, case: MiniBatch, measure: Any) -> Finding:
        update = self._update(case)
        try:
            error, where = measure(case, update)
        except TokenCountError as problem:  # raised on all ranks alike, which can go on
            error, where = math.inf, str(problem)
        return Finding(split, len(update.micro_batches), error, where)

    def _gradient(self, case: MiniBatch, update: Update) -> tuple[float, str]:
        loss = self._actor.gradient(self._weighed(update), self._loss)["loss"]
        with self._actor.gradients_as_weights():
            error, where = self._compare(case.name)
        want = float(self._answers["loss"][case.name])
        loss_error = abs(loss - want) / max(1.0, abs(want))
        return (error, where) if error >= loss_error else (loss_error, "the loss itself")

    def _first_ratio(self, case: MiniBatch, update: Update) -> tuple[float, str]:
        (update,), _ = self._actor.with_old_logprobs([update])
        metrics = self._actor.gradient(update, self._loss)
        ratios = metrics["ratio"], metrics["ratio_max"]
        # Exactly 1, or wrong: the two passes see the same micro-batches and kernels.
        return (0.0, "exactly 1") if ratios == (1, 1) else (math.inf, f"ratio to itself: mean and largest {ratios}")

    def _two_steps(self, update: Update, second: MiniBatch) -> tuple[float, str]:
        lr = self._job.config.optimizer.lr
        for part in (update, self._update(second)):
            result = self._actor.step(self._weighed(part), self._loss, lr=lr)
            if result.skipped:
                return math.inf, result.skipped
        return self._compare(TWO_STEPS)

    def _compare(self, name: str) -> tuple[float, str]:
        got = {key: tensor.to("cpu", copy=True) for key, tensor in self._checkpoint.export(self._actor.chunks)}
        if not self._topo.is_leader:
            return 0.0, ""
        return worst(got, self._answers[name], math.inf if self._job.config.model.dtype == "float32" else 2)

    def _weighed(self, update: Update) -> Update:
        (update,), _ = weigh([update], self._job.config.algo, Replicas(self._topo))
        return update

    def _update(self, case: MiniBatch) -> Update:
        """This rank's share, packed by the leader as in a run."""
        ranks = None
        if self._topo.is_leader:
            ranks, old, ref = (self._packed(case, logprobs) for logprobs in (None, case.old, case.ref))
            ranks = [
                replace(
                    update,
                    micro_batches=tuple(
                        replace(batch, old_logprobs_T=a.rollout_logprobs_T, ref_logprobs_T=b.rollout_logprobs_T)
                        for batch, a, b in zip(update.micro_batches, x.micro_batches, y.micro_batches, strict=True)
                    ),
                )
                for (update,), (x,), (y,) in zip(ranks, old, ref, strict=True)
            ]
        return topology.scatter(ranks, self._topo)

    def _packed(self, case: MiniBatch, logprobs: Sequence[Tensor] | None) -> list[list[Update]]:
        """With these in the place of the engine's log-probs: packing looks at lengths alone."""
        samples = case.samples
        if logprobs is not None:
            samples = [replace(s, rollout_logprobs=x) for s, x in zip(samples, logprobs, strict=True)]
        parallel = self._job.config.parallel
        return pack(
            samples,
            mini_batch=len(samples),
            micro_batch_tokens=case.budget,
            data_parallel=self._topo.dp,
            seed=case.name,
            sequence_multiple=parallel.sequence_multiple,
            total_multiple=parallel.total_multiple,
            micro_batch_multiple=parallel.micro_batch_multiple,
        )
