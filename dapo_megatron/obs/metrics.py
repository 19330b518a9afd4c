"""Names of metrics, their meaning, and how the numbers of a step come together."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dapo_megatron.measures import Measures, reduce, values
from dapo_megatron.types import UpdateResult

PHASES = ("offload", "wake", "publish", "rollout", "sleep", "logprobs", "update")
"""What a step does, in order; where memory.offload names something, offload comes around the push of weights and after
the rollout, and where engines sleep (engine.sleep), they wake around the push as well. Phases of other names belong to
no step."""

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
    "engine/cached": "share of the tokens of prompts, once for each response, whose keys and values the engines had in "
    "their prefix caches; of vLLM, the last response to a prompt stands for all",
    "engine/restarts": "how often engines that failed were started again",
    "engine/tokens_per_second_min": "tokens a second of sampling (evaluations since the step before included) of the "
    "engine that wrote least; far from the other one says that an engine is slow, or was not there",
    "engine/tokens_per_second_max": "the same of the engine that wrote most",
    "engine/sleep_seconds": "giving up the memory of all engines that sleep (engine.sleep), restarts that this waited "
    "for and the start of the run included",
    "engine/wake_seconds": "taking it again, of weights and of KV caches",
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
    **{f"weight_norm/{kind}": f"norm of the weights of {what}, mean over the updates" for kind, what in _KINDS.items()},
    **{
        f"update_ratio/{kind}": f"norm of the update over norm of the weights, of {what}, mean over the updates"
        for kind, what in _KINDS.items()
    },
    "updates/skipped": "updates left out because the loss, a ratio or the gradient was not finite",
    "lr": "learning rate of the last update",
    "loss_tokens": "tokens trained on, all updates together",
    "ratio/mean": "mean probability ratio, policy to old policy",
    "ratio/max": "largest probability ratio",
    "ratio/first_max": "the same in the first update, where policy and old policy are one: 1, unless rounding differs",
    "kl/old": "KL(old policy || policy), k3 estimate, nats per token",
    "kl/ref": "KL(policy || reference) by algo.kl.estimator, nats per token",
    "verify/tensors": "tensors of the last push, all of the model's, whose form and checksum every engine compared",
    "verify/canary": "mean |difference| between the log-probs of engine and trainer, nats, in the answer to a fixed "
    "prompt after the last push, of the engine that is farthest off",
    "verify/canary_max": "largest such difference",
    "push/seconds": "from the first word to the engines about the last push until all use the weights",
    "push/share": "bytes that this push sent, over those of the model; weights that engines have are left out",
    "push/gb_per_second": "bytes that it sent, over its seconds, 1e9 bytes; each engine gets so much",
    "seconds/verify": "of the seconds that publishing took, those for checksums on the leader and for the canary",
    "seconds/offload": "moving what memory.offload names to host memory and back",
    "seconds/wake": "having engines that sleep take their memory again, once all ranks have given it up; with "
    "weights.verify=full, the KV cache wakes in seconds/publish",
    "seconds/publish": "sending the weights to the engines",
    "seconds/rollout": "sampling and grading, and waiting for both",
    "seconds/sleep": "having engines give up their memory",
    "seconds/logprobs": "log-probs of the old policy, and of the reference where there is one",
    "seconds/update": "all optimizer steps",
    "seconds/step": "from the push of the weights, or the offload before it, to the last update, evaluations left out",
    **{
        f"memory/{phase}": f"peak of {what}, GiB, on the rank that has most: what torch allocated on its GPU, or on "
        f"CPU what is resident"
        for phase, what in {
            "offload": "moving to host memory and back",
            "wake": "ranks while engines wake",
            "publish": "sending the weights",
            "rollout": "the rollout, on ranks; engines are not in it",
            "sleep": "ranks while engines go to sleep",
            "logprobs": "the log-prob passes",
            "update": "the optimizer steps",
        }.items()
    },
    "memory/reserved": "the most that torch's allocator held of a GPU during the step, GiB, on the rank that has most",
    "memory/device": "the most that was in use on a GPU at the end of a phase, GiB, by whatever process",
    "eval/accuracy": "share of right responses to held-out prompts, eval.samples each. Sets of eval.sets have all of "
    "these as eval/NAME/accuracy, and so on",
    "eval/accuracy_low": "lower end of its 95% interval, over prompts",
    "eval/accuracy_high": "upper end of its 95% interval, over prompts",
    "eval/pass_at_k": "share of held-out prompts with a right response among all that were sampled, k of them",
    "eval/majority_at_k": "share of held-out prompts whose most frequent answer is right, of the k responses",
    "eval/response_length": "mean length of the responses to held-out prompts in tokens",
    "eval/truncated": "share of them that ran into the cap",
    "eval/seconds": "how long the evaluation took",
}
"""Metric -> meaning, as in metrics.jsonl, TensorBoard and the other sinks; what only some loss measures is in its file
(`algo.loss.Loss.meanings`)."""


def step_metrics(before: Measures, results: Sequence[UpdateResult]) -> dict[str, float]:
    """All metrics of one step but its times, which the observer adds.

    Args:
        before: what was measured before the first update.
        results: the updates. One that was skipped, or had no loss tokens, has nothing to add to the measures.
    """
    made = [result for result in results if result.skipped is None and result.loss_tokens]
    metrics = {
        **values(before),
        "loss": math.nan,
        "grad_norm": math.nan,
        **values(reduce([result.measures for result in made]) if made else {}),
        "lr": results[-1].lr,
        "loss_tokens": sum(result.loss_tokens for result in made),
        "updates/skipped": sum(result.skipped is not None for result in results),
    }
    if made and made[0] is results[0] and "ratio/max" in made[0].measures:
        metrics["ratio/first_max"] = made[0]["ratio/max"]
    return metrics
