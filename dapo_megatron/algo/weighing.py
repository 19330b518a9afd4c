"""Between the old log-probs and the updates: how far engine and trainer disagree, and what each token then weighs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dapo_megatron.algo import scope
from dapo_megatron.algo.correction import correct, token_importance
from dapo_megatron.algo.mismatch import mismatch
from dapo_megatron.algo.quantiles import quantiles
from dapo_megatron.algo.replicas import Replicas
from dapo_megatron.algo.segments import segment_sums, segments
from dapo_megatron.config import AlgoConfig, CorrectionConfig
from dapo_megatron.types import MicroBatch, MiniBatch

RATIO_QUANTILES = {
    "mismatch_ratio_p01": 0.01,
    "mismatch_ratio_p50": 0.5,
    "mismatch_ratio_p99": 0.99,
    "mismatch_ratio_p999": 0.999,
}
"""Metric -> fraction of the tokens whose importance (trainer / engine) is not above it."""


def weigh(
    mini_batches: Sequence[MiniBatch], algo: AlgoConfig, replicas: Replicas
) -> tuple[list[MiniBatch], dict[str, float]]:
    """Measure the mismatch, correct it as configured, and weigh each token by its correction and scope. Collective.

    Needs old log-probs. Micro-batches are whole, in host memory, and alike on all ranks of a replica.

    Returns:
        The mini-batches with loss_mask_T and weights_T set and, where tokens were masked, fewer loss_tokens; and the
        metrics of `measure` and `corrected`.
    """
    mismatches = measure(mini_batches, replicas)
    mini_batches, changes = corrected(mini_batches, algo.correction, replicas)
    return scoped(mini_batches, algo.loss_scope, replicas), {**mismatches, **changes}


def measure(mini_batches: Sequence[MiniBatch], replicas: Replicas) -> dict[str, float]:
    """mismatch_kl, mismatch_abs, mismatch_abs_max (`algo.mismatch`) and `RATIO_QUANTILES`. Collective.

    Over all loss tokens of all mini-batches: exact means, nan over none, and order statistics of float32 ratios.
    """
    batches = [batch for mini_batch in mini_batches for batch in mini_batch.micro_batches]
    parts = [mismatch(*_logprobs(batch), batch.loss_mask_T) for batch in batches]
    sums = replicas.sum(
        torch.stack([torch.stack([part["mismatch_kl"], part["mismatch_abs"]]) for part in parts]).sum(0)
    )
    largest = replicas.max(torch.stack([part["mismatch_abs_max"] for part in parts]).amax())
    ratios_T = torch.cat(
        [token_importance(*_logprobs(batch), batch.loss_mask_T)[batch.loss_mask_T].float() for batch in batches]
    )
    ratios_Q = quantiles(ratios_T, list(RATIO_QUANTILES.values()), replicas)
    tokens = _loss_tokens(mini_batches)
    return {
        "mismatch_kl": _mean(sums[0], tokens),
        "mismatch_abs": _mean(sums[1], tokens),
        "mismatch_abs_max": largest.item(),
        **dict(zip(RATIO_QUANTILES, ratios_Q.tolist(), strict=True)),
    }


def corrected(
    mini_batches: Sequence[MiniBatch], correction: CorrectionConfig, replicas: Replicas
) -> tuple[list[MiniBatch], dict[str, float]]:
    """The mini-batches with the mask and the weights of `correction`. Collective.

    Masked tokens leave MiniBatch.loss_tokens: they are taken from the count made when packing, which the actor's own
    count of the masks thereby still checks.

    Returns:
        Also, unless of kind "none": correction_weight, the mean weight of the tokens that stay, and the share of tokens
        that were changed, correction_truncated or correction_masked. Exact means; nan over no tokens.
    """
    local: list[MiniBatch] = []
    rows = []
    for mini_batch in mini_batches:
        batches, sums = [], torch.zeros(3, dtype=torch.float64)
        for batch in mini_batch.micro_batches:
            weights_T, mask_T, changed_T = correct(*_logprobs(batch), batch.loss_mask_T, batch.cu_seqlens, correction)
            weights_T = torch.where(mask_T, weights_T, 0)
            masked = batch.loss_mask_T.sum() - mask_T.sum()
            sums += torch.stack([masked.double(), changed_T.sum().double(), weights_T.sum()])
            batches.append(replace(batch, loss_mask_T=mask_T, weights_T=weights_T.float()))
        local.append(replace(mini_batch, micro_batches=tuple(batches)))
        rows.append(sums)
    sums_U3 = replicas.sum(torch.stack(rows))
    result = [
        replace(mini_batch, loss_tokens=mini_batch.loss_tokens - int(masked))
        for mini_batch, masked in zip(local, sums_U3[:, 0].tolist(), strict=True)
    ]
    if correction.kind == "none":
        return result, {}
    return result, {
        "correction_weight": _mean(sums_U3[:, 2].sum(), _loss_tokens(result)),
        f"correction_{correction.kind}": _mean(sums_U3[:, 1].sum(), _loss_tokens(mini_batches)),
    }


def scoped(mini_batches: Sequence[MiniBatch], of: scope.Scope, replicas: Replicas) -> list[MiniBatch]:
    """The mini-batches with weights_T multiplied by the weights of their scope (`algo.scope`). Collective."""
    tokens = [
        [segment_sums(batch.loss_mask_T.long(), batch.cu_seqlens) for batch in mini_batch.micro_batches]
        for mini_batch in mini_batches
    ]
    groups = [torch.cat([batch.groups_S for batch in mini_batch.micro_batches]) for mini_batch in mini_batches]
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
    for mini_batch, tokens_, totals_P in zip(mini_batches, tokens, totals_UP, strict=True):
        batches = []
        for batch, tokens_S in zip(mini_batch.micro_batches, tokens_, strict=True):
            weights_S = scope.weights(of, tokens_S, batch.groups_S, totals_P, mini_batch.loss_tokens)
            weights_T = batch.weights_T * weights_S[segments(batch.cu_seqlens)]
            batches.append(replace(batch, weights_T=weights_T.float()))
        result.append(replace(mini_batch, micro_batches=tuple(batches)))
    return result


def _logprobs(batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Old and rollout, float64: sums over a long response keep their digits."""
    assert batch.old_logprobs_T is not None, "the batch has no old log-probs; compute them before weighing"
    return batch.old_logprobs_T.double(), batch.rollout_logprobs_T.double()


def _loss_tokens(mini_batches: Sequence[MiniBatch]) -> int:
    return sum(mini_batch.loss_tokens for mini_batch in mini_batches)


def _mean(total: Tensor, count: int) -> float:
    return total.item() / count if count else math.nan
