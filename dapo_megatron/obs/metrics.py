"""Names of metrics, their meaning, and how the numbers of a step come together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from dapo_megatron.types import Group, StepResult

PHASES = ("rollout", "logprobs", "update", "publish")
"""What a step does, in order. Phases of other names belong to no step."""

_KINDS = {
    "embedding": "the embedding",
    "attention": "the attention layers",
    "mlp": "the feed-forward layers",
    "norm": "the norms",
    "output": "the output layer, where it is not the embedding",
    "other": "parameters of other names, where the model has any",
}

METRICS = {
    "accuracy": "share of right responses among all that were sampled in this step, kept or not",
    "reward": "mean reward of the same responses, length penalty included",
    "response_length": "mean length of the same responses in tokens, the end token included",
    "truncated": "share of the same responses that ran into rollout.max_response_tokens",
    "truncated_right": "share of truncated responses whose answer is right, whatever reward.truncated_is_wrong says",
    "grading_timeouts": "responses whose grading ran out of time; they count as wrong",
    "staleness": "weight updates between a response's oldest weights and those in use: mean over what is trained on",
    "response_length_max": "longest response in the groups that are trained on",
    "groups/kept": "groups that are trained on: mixed ones, where dynamic sampling is on",
    "groups/all_right": "groups without a wrong response",
    "groups/all_wrong": "groups without a right response",
    "groups/discarded": "mixed groups beyond rollout.prompts",
    "generation_batches": "how often prompts were drawn to fill the step",
    "tokens_per_second": "tokens sampled, over the seconds that sampling and grading took",
    "entropy": "mean entropy in nats of the policy's next-token distribution, before the first update",
    "top_prob": "mean probability of its most likely token, before the first update",
    "mismatch/kl": "KL(engine || trainer) for the same weights, k3 estimate, nats per token; far from 0 is a bug",
    "mismatch/abs": "mean |difference| between the log-probs of engine and trainer, nats",
    "mismatch/abs_max": "largest such difference",
    "mismatch/ratio_p01": "1% of tokens have a lower probability ratio, trainer to engine, or the same",
    "mismatch/ratio_p50": "median of that ratio",
    "mismatch/ratio_p99": "1% of tokens have a higher one",
    "mismatch/ratio_p999": "0.1% of tokens have a higher one",
    "correction/weight": "mean weight by which algo.correction multiplies a token's loss",
    "correction/truncated": "share of tokens whose weight is at algo.correction.cap",
    "correction/masked": "share of tokens outside algo.correction.band, which leave the loss",
    "pack/waste": "part of the slots of all micro-batches that are padding",
    "pack/imbalance_tokens": "slots of the fullest data-parallel rank over the mean, less 1, in the worst update",
    "pack/imbalance_cost": "the same of the estimated work, attention included: time that the mean rank waits",
    "pack/micro_batches": "micro-batches of each rank and update",
    "loss": "mean over loss tokens; near 0 by construction, it does not measure progress",
    "grad_norm": "before clipping, mean over the updates of the step",
    **{f"grad_norm/{kind}": f"the same of {what} alone" for kind, what in _KINDS.items()},
    **{
        f"update_ratio/{kind}": f"norm of the update over norm of the weights, of {what}"
        for kind, what in _KINDS.items()
    },
    "updates/skipped": "updates left out because the loss, a ratio or the gradient was not finite",
    "lr": "learning rate of the last update",
    "loss_tokens": "tokens trained on, all updates together",
    "clip/high": "share of tokens whose ratio is above 1 + clip_high with a positive advantage",
    "clip/low": "share of tokens whose ratio is below 1 - clip_low with a negative advantage",
    "clip/dual": "share of tokens at the bound of dual_clip",
    "ratio/mean": "mean probability ratio, policy to old policy",
    "ratio/max": "largest probability ratio",
    "ratio/first_max": "the same in the first update, where policy and old policy are one: 1, unless rounding differs",
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
    "mismatch_ratio_p01": "mismatch/ratio_p01",
    "mismatch_ratio_p50": "mismatch/ratio_p50",
    "mismatch_ratio_p99": "mismatch/ratio_p99",
    "mismatch_ratio_p999": "mismatch/ratio_p999",
    "correction_weight": "correction/weight",
    "correction_truncated": "correction/truncated",
    "correction_masked": "correction/masked",
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
    def truncated_right(self) -> float: ...
    @property
    def timed_out(self) -> int: ...
    @property
    def staleness(self) -> float: ...
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
        "truncated_right": stats.truncated_right,
        "grading_timeouts": stats.timed_out,
        "staleness": stats.staleness,
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
    """Means over the updates that were made: one that was skipped, or had no loss tokens, has nothing to average."""
    made = [result for result in results if result.skipped is None and result.loss_tokens]
    metrics: dict[str, float] = {
        "loss": _token_mean([result.loss for result in made], made),
        "grad_norm": _mean([result.grad_norm for result in made]),
        "lr": results[-1].lr,
        "loss_tokens": sum(result.loss_tokens for result in made),
        "updates/skipped": sum(result.skipped is not None for result in results),
    }
    if made and made[0] is results[0] and "ratio_max" in made[0].metrics:
        metrics["ratio/first_max"] = made[0].metrics["ratio_max"]
    for name in made[0].metrics if made else ():
        values = [result.metrics[name] for result in made]
        if name.endswith("_max"):
            value = max(values)
        elif "/" in name:
            value = _mean(values)
        else:
            value = _token_mean(values, made)
        metrics[_NAMES.get(name, name)] = value
    return metrics


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _token_mean(values: Sequence[float], results: Sequence[StepResult]) -> float:
    tokens = sum(result.loss_tokens for result in results)
    if not tokens:
        return math.nan
    return math.fsum(value * result.loss_tokens for value, result in zip(values, results, strict=True)) / tokens
