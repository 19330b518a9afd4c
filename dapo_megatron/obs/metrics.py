"""Names of metrics, their meaning, and how the numbers of a step come together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from dapo_megatron.types import Group, StepResult

PHASES = ("rollout", "logprobs", "update", "publish")
"""What a step does, in order. Phases of other names belong to no step."""

METRICS = {
    "accuracy": "share of right responses among all that were sampled in this step, kept or not",
    "reward": "mean reward of the same responses, length penalty included",
    "response_length": "mean length of the same responses in tokens, the end token included",
    "truncated": "share of the same responses that ran into rollout.max_response_tokens",
    "response_length_max": "longest response in the groups that are trained on",
    "groups/kept": "groups that are trained on: mixed ones, where dynamic sampling is on",
    "groups/all_right": "groups without a wrong response",
    "groups/all_wrong": "groups without a right response",
    "groups/discarded": "mixed groups beyond rollout.prompts",
    "generation_batches": "how often prompts were drawn to fill the step",
    "tokens_per_second": "tokens sampled, over the seconds that sampling and grading took",
    "entropy": "mean entropy in nats of the policy's next-token distribution, before the first update",
    "mismatch/kl": "KL(engine || trainer) for the same weights, k3 estimate, nats per token; far from 0 is a bug",
    "mismatch/abs": "mean |difference| between the log-probs of engine and trainer, nats",
    "mismatch/abs_max": "largest such difference",
    "loss": "mean over loss tokens; near 0 by construction, it does not measure progress",
    "grad_norm": "before clipping, mean over the updates of the step",
    "lr": "learning rate of the last update",
    "loss_tokens": "tokens trained on, all updates together",
    "clip/high": "share of tokens whose ratio is above 1 + clip_high with a positive advantage",
    "clip/low": "share of tokens whose ratio is below 1 - clip_low with a negative advantage",
    "clip/dual": "share of tokens at the bound of dual_clip",
    "ratio/mean": "mean probability ratio, policy to old policy",
    "ratio/max": "largest probability ratio",
    "kl/old": "KL(old policy || policy), k3 estimate, nats per token",
    "kl/ref": "KL(policy || reference) by algo.kl.estimator, nats per token",
    "seconds/rollout": "sampling and grading, and waiting for both",
    "seconds/logprobs": "log-probs of the old policy, and of the reference where there is one",
    "seconds/update": "all optimizer steps",
    "seconds/publish": "sending the weights to the engines",
    "seconds/step": "from the start of the rollout until the weights are published",
    "eval/accuracy": "share of right responses to held-out prompts",
    "eval/accuracy_low": "lower end of its 95% interval",
    "eval/accuracy_high": "upper end of its 95% interval",
    "eval/response_length": "mean length of the responses to held-out prompts in tokens",
    "eval/truncated": "share of them that ran into the cap",
    "eval/seconds": "how long the evaluation took",
}
"""Metric -> meaning, as in metrics.jsonl, TensorBoard and the other sinks."""

_NAMES = {
    "clip_fraction_high": "clip/high",
    "clip_fraction_low": "clip/low",
    "dual_clip_fraction": "clip/dual",
    "ratio": "ratio/mean",
    "ratio_max": "ratio/max",
    "kl_old": "kl/old",
    "kl_ref": "kl/ref",
    "mismatch_kl": "mismatch/kl",
    "mismatch_abs": "mismatch/abs",
    "mismatch_abs_max": "mismatch/abs_max",
}
"""What losses and measures call a sum -> metric. Other names stay as they are."""


class SamplingStats(Protocol):
    """What a rollout counts (`rollout.collect.RolloutStats`)."""

    @property
    def generation_batches(self) -> int: ...
    @property
    def all_right(self) -> int: ...
    @property
    def all_wrong(self) -> int: ...
    @property
    def discarded(self) -> int: ...
    @property
    def accuracy(self) -> float: ...
    @property
    def reward(self) -> float: ...
    @property
    def length(self) -> float: ...
    @property
    def truncated(self) -> float: ...
    @property
    def tokens(self) -> int: ...
    @property
    def seconds(self) -> float: ...


def step_metrics(stats: SamplingStats, policy: Mapping[str, float], results: Sequence[StepResult]) -> dict[str, float]:
    """All metrics of one step but its lengths and times, which the observer adds.

    Args:
        policy: means over the tokens of the step, before its first update.
        results: the optimizer steps. Their means are weighted by loss tokens, so that the result is again a mean over
            tokens; of maxima the largest is taken.
    """
    return {
        "accuracy": stats.accuracy,
        "reward": stats.reward,
        "response_length": stats.length,
        "truncated": stats.truncated,
        "groups/all_right": stats.all_right,
        "groups/all_wrong": stats.all_wrong,
        "groups/discarded": stats.discarded,
        "generation_batches": stats.generation_batches,
        "tokens_per_second": stats.tokens / stats.seconds if stats.seconds else math.nan,
        **{_NAMES.get(name, name): value for name, value in policy.items()},
        **(_updates(results) if results else {}),
    }


def longest_response(groups: Sequence[Group]) -> float:
    """In tokens; nan without groups."""
    return max((completion.length for group in groups for completion in group.completions), default=math.nan)


def _updates(results: Sequence[StepResult]) -> dict[str, float]:
    tokens = sum(result.loss_tokens for result in results)
    metrics: dict[str, float] = {
        "loss": _token_mean([result.loss for result in results], results, tokens),
        "grad_norm": math.fsum(result.grad_norm for result in results) / len(results),
        "lr": results[-1].lr,
        "loss_tokens": tokens,
    }
    for name in results[0].metrics:
        values = [result.metrics[name] for result in results]
        metrics[_NAMES.get(name, name)] = max(values) if name.endswith("_max") else _token_mean(values, results, tokens)
    return metrics


def _token_mean(values: Sequence[float], results: Sequence[StepResult], tokens: int) -> float:
    if not tokens:
        return math.nan
    return math.fsum(value * result.loss_tokens for value, result in zip(values, results, strict=True)) / tokens
