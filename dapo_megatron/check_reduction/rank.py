"""Measures all mini-batches in one layout, on one rank of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dapo_megatron.actor import topology
from dapo_megatron.actor.actor import Actor, TokenCountError
from dapo_megatron.actor.topology import Topology
from dapo_megatron.algo.objective import Objective
from dapo_megatron.algo.weighing import weigh
from dapo_megatron.check_reduction.reference import Case, errors
from dapo_megatron.check_reduction.report import Finding
from dapo_megatron.config import Config
from dapo_megatron.pack import Share, pack
from dapo_megatron.types import MiniBatch
from dapo_megatron.weights.hf import HfCheckpoint

FIRST_RATIO = "first ratio"
TWO_UPDATES = "two updates"
LOSS = "the loss itself"


@dataclass(frozen=True, slots=True)
class Job:
    """One layout, one model."""

    config: Config
    """The user's, with the miniature's path and the layout's sizes."""
    cases: tuple[Case, ...]
    answers: Path
    """File of torch.save: {case or TWO_UPDATES: {name: (wanted float64, unit of its error float64 0-d)}}. The name LOSS
    is the loss."""
    order: float
    """Order of the norm that errors are measured by."""
    updates: tuple[int, int]
    """Which cases the two updates are made with."""


def beside_one(loss: float) -> Tensor:
    """Return float64 [2]: next to a 1, the error of a loss near 0 is not relative to the loss."""
    return torch.tensor([loss, 1.0], dtype=torch.float64)


def check(job: Job) -> list[Finding]:
    """Run the job. Collective over the ranks of the layout; only the leader's findings have numbers."""
    topo = topology.initialize(job.config.parallel)
    findings = _Check(job, topo).findings()
    topology.shutdown()  # not after a failure, which ends the processes
    return findings


class _Check:
    def __init__(self, job: Job, topo: Topology) -> None:
        self._job, self._topo = job, topo
        self._checkpoint = HfCheckpoint(job.config.model.path)
        self._actor = Actor(job.config, topo, self._checkpoint)
        self._objective = Objective(job.config.algo)
        self._answers: dict[str, dict[str, tuple[Tensor, Tensor]]] = torch.load(job.answers, weights_only=True)

    def findings(self) -> list[Finding]:
        packed = [self._mini_batch(case) for case in self._job.cases]
        # All at once, as the mini-batches of one rollout: what counts is a mini-batch's own.
        weighed, _ = weigh(packed, self._job.config.algo, self._topo)
        found = [
            self._measured(case.name, [mini_batch], lambda mini_batches, case=case: self._gradient(case, *mini_batches))
            for case, mini_batch in zip(self._job.cases, weighed, strict=True)
        ]
        found.append(self._measured(FIRST_RATIO, [packed[index] for index in self._job.updates], self._first_ratio))
        found.append(self._measured(TWO_UPDATES, [weighed[index] for index in self._job.updates], self._updates))
        return found

    def _measured(
        self, split: str, mini_batches: list[MiniBatch], measure: Callable[[list[MiniBatch]], tuple[float, str]]
    ) -> Finding:
        try:
            error, where = measure(mini_batches)
        except TokenCountError as problem:  # raised on all ranks alike, which can go on
            error, where = math.inf, str(problem)
        return Finding(split, len(mini_batches[0].micro_batches), error, where)

    def _gradient(self, case: Case, mini_batch: MiniBatch) -> tuple[float, str]:
        loss = self._actor.gradient(mini_batch, self._objective)["loss"].value
        with self._actor.gradients_as_weights():
            return self._compare(case.name, {LOSS: beside_one(loss)})

    def _first_ratio(self, mini_batches: list[MiniBatch]) -> tuple[float, str]:
        filled, _ = self._actor.with_old_logprobs(mini_batches)
        ratios = set()
        for mini_batch in filled:
            measures = self._actor.gradient(mini_batch, self._objective)
            ratios |= {measures["ratio/mean"].value, measures["ratio/max"].value}
        # Exactly 1, or wrong: the two passes see the same micro-batches and kernels.
        return (0.0, "exactly 1") if ratios == {1} else (math.inf, f"ratios to itself, mean and largest: {ratios}")

    def _updates(self, mini_batches: list[MiniBatch]) -> tuple[float, str]:
        for mini_batch in mini_batches:
            result = self._actor.update(mini_batch, self._objective, lr=self._job.config.optimizer.lr)
            if result.skipped:
                return math.inf, result.skipped
        return self._compare(TWO_UPDATES, {})

    def _compare(self, name: str, more: dict[str, Tensor]) -> tuple[float, str]:
        got = {key: tensor.to("cpu", copy=True) for key, tensor in self._checkpoint.export(self._actor.chunks)}
        if not self._topo.is_leader:
            return 0.0, ""
        answers = self._answers[name]
        off = errors({**got, **more}, {key: want for key, (want, _) in answers.items()}, self._job.order)
        in_units = {key: error / answers[key][1].item() if key in answers else error for key, error in off.items()}
        where = max(in_units, key=lambda key: in_units[key])
        return in_units[where], where

    def _mini_batch(self, case: Case) -> MiniBatch:
        """Return this rank's share of a case, packed by the leader as in a run."""
        own, old, ref = (self._scattered(case, logprobs) for logprobs in (None, case.old, case.ref))
        micro_batches = tuple(
            replace(batch, old_logprobs_T=a.rollout_logprobs_T, ref_logprobs_T=b.rollout_logprobs_T)
            for batch, a, b in zip(own.micro_batches, old.micro_batches, ref.micro_batches, strict=True)
        )
        return replace(own, micro_batches=micro_batches)

    def _scattered(self, case: Case, logprobs: Sequence[Tensor] | None) -> MiniBatch:
        """Scatter a case with these in the place of the engine's log-probs: packing looks at lengths alone."""
        samples = case.samples
        if logprobs is not None:
            samples = [replace(s, rollout_logprobs=x) for s, x in zip(samples, logprobs, strict=True)]
        parallel = self._job.config.parallel
        multiples = {"sequence_multiple": parallel.sequence_multiple, "total_multiple": parallel.total_multiple}
        unit = math.prod(multiples.values())
        longest = max(case.budget, *(sample.length for sample in samples))
        packed = pack(
            samples,
            mini_batch=len(samples),
            micro_batch_tokens=-(-longest // unit) * unit,
            replicas=self._topo.dp,
            seed=case.name,
            micro_batch_multiple=parallel.micro_batch_multiple,
            **multiples,
        )
        share = Share(*self._topo.scatter(packed.share if self._topo.is_leader else None))
        (mini_batch,) = share.mini_batches(**multiples)
        return mini_batch
