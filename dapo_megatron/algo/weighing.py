"""Measures how far engine and trainer disagree, and weighs tokens: after the old log-probs, before the updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dapo_megatron.algo import scope
from dapo_megatron.algo.correction import correct, importance
from dapo_megatron.algo.mismatch import mismatch
from dapo_megatron.algo.quantiles import quantiles
from dapo_megatron.algo.replicas import Replicas
from dapo_megatron.algo.segments import segment_sums, segments
from dapo_megatron.config import AlgoConfig, CorrectionConfig
from dapo_megatron.measures import Max, Mean, Measure, Measures, reduce
from dapo_megatron.types import MicroBatch, MiniBatch

RATIO_QUANTILES = {
    "mismatch/ratio_p01": 0.01,
    "mismatch/ratio_p50": 0.5,
    "mismatch/ratio_p99": 0.99,
    "mismatch/ratio_p999": 0.999,
}
"""Metric -> fraction of the tokens whose importance (trainer / engine) is not above it."""


def weigh(
    mini_batches: Sequence[MiniBatch], algo: AlgoConfig, replicas: Replicas
) -> tuple[list[MiniBatch], dict[str, Measure]]:
    """Measure the mismatch, correct it as configured, and weigh each token by its correction and scope. Collective.

    The mini-batches have old log-probs. Micro-batches are whole, in host memory, and alike on all ranks of a replica.

    Returns:
        The mini-batches with loss_mask_T and weights_T set and, where tokens were masked, fewer loss_tokens; and the
        measures of `measure` and `corrected`.
    """
    mismatches = measure(mini_batches, replicas)
    mini_batches, changes = corrected(mini_batches, algo.correction, replicas)
    return scoped(mini_batches, algo, replicas), {**mismatches, **changes}


def measure(mini_batches: Sequence[MiniBatch], replicas: Replicas) -> dict[str, Measure]:
    """Measure `algo.mismatch` and `RATIO_QUANTILES` over all loss tokens of all mini-batches. Collective.

    The quantiles are order statistics of float32 ratios; nan over no tokens.
    """
    batches = [batch for whole in mini_batches for batch in whole.micro_batches]
    parts = [mismatch(*_logprobs(batch), batch.loss_mask_T) for batch in batches]
    ratios_T = torch.cat(
        [importance(*_logprobs(batch), batch.loss_mask_T)[batch.loss_mask_T].float() for batch in batches]
    )
    ratios_Q = quantiles(ratios_T, list(RATIO_QUANTILES.values()), replicas)
    at_quantiles = {name: Max(ratio) for name, ratio in zip(RATIO_QUANTILES, ratios_Q.tolist(), strict=True)}
    return reduce(parts, replicas.sum, replicas.max) | at_quantiles


def corrected(
    mini_batches: Sequence[MiniBatch], correction: CorrectionConfig, replicas: Replicas
) -> tuple[list[MiniBatch], dict[str, Measure]]:
    """Give the mini-batches the mask and the weights of `correction`. Collective.

    Masked tokens leave MiniBatch.loss_tokens: they are taken from the count made when packing, which the actor's own
    count of the masks thereby still checks.

    Returns:
        The mini-batches and, unless the kind is "none": correction/weight, the mean weight of the tokens that stay, and
        the share of tokens that were changed, correction/truncated or correction/masked.
    """
    local: list[MiniBatch] = []
    masked_U: list[Tensor] = []
    parts: list[Measures] = []
    for whole in mini_batches:
        batches, masked = [], torch.zeros((), dtype=torch.int64)
        for batch in whole.micro_batches:
            weights_T, mask_T, changed_T = correct(*_logprobs(batch), batch.loss_mask_T, batch.cu_seqlens, correction)
            weights_T = torch.where(mask_T, weights_T, 0)
            masked = masked + batch.loss_mask_T.sum() - mask_T.sum()
            parts.append(
                {
                    "correction/weight": Mean(weights_T.sum(), mask_T.sum()),
                    f"correction/{correction.kind}": Mean(changed_T.sum(), batch.loss_mask_T.sum()),
                }
            )
            batches.append(replace(batch, loss_mask_T=mask_T, weights_T=weights_T.float()))
        local.append(replace(whole, micro_batches=tuple(batches)))
        masked_U.append(masked)
    if correction.kind == "none":
        return local, {}
    counts = replicas.sum(torch.stack(masked_U)).tolist()
    result = [replace(whole, loss_tokens=whole.loss_tokens - gone) for whole, gone in zip(local, counts, strict=True)]
    return result, reduce(parts, replicas.sum, replicas.max)


def scoped(mini_batches: Sequence[MiniBatch], algo: AlgoConfig, replicas: Replicas) -> list[MiniBatch]:
    """Multiply weights_T by the weights of algo.loss_scope (`algo.scope`). Collective."""
    of = algo.loss_scope
    tokens = [
        [segment_sums(batch.loss_mask_T.double(), batch.cu_seqlens) for batch in whole.micro_batches]
        for whole in mini_batches
    ]
    groups = [torch.cat([batch.groups_S for batch in whole.micro_batches]) for whole in mini_batches]
    highest = replicas.max(torch.cat([*groups, torch.tensor([0])]).amax().double())
    totals_UP = replicas.sum(
        torch.stack(
            [
                scope.counts(of, torch.cat(tokens_), groups_S, int(highest) + 1)
                for tokens_, groups_S in zip(tokens, groups, strict=True)
            ]
        )
    )
    result = []
    for whole, tokens_, totals_P in zip(mini_batches, tokens, totals_UP, strict=True):
        batches = []
        for batch, tokens_S in zip(whole.micro_batches, tokens_, strict=True):
            weights_S = scope.weights(of, tokens_S, batch.groups_S, totals_P, whole.loss_tokens, algo.scope_length)
            weights_T = batch.weights_T * weights_S[segments(batch.cu_seqlens)]
            batches.append(replace(batch, weights_T=weights_T.float()))
        result.append(replace(whole, micro_batches=tuple(batches)))
    return result


def _logprobs(batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Return old and rollout log-probs in float64: sums over a long response keep their digits."""
    assert batch.old_logprobs_T is not None, "the batch has no old log-probs; compute them before weighing"
    return batch.old_logprobs_T.double(), batch.rollout_logprobs_T.double()
