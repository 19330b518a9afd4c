"""Log-probabilities and entropy from logits that are split over tensor-parallel ranks along the vocabulary.

T tokens, V the columns of this rank (padding included). Arithmetic is float32; tokens go through in chunks, so that no
float32 copy of all logits is ever alive, in the forward or in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24
"""Logits per chunk: 64 MiB in float32."""


def vocab_parallel_logprobs(
    logits_TV: Tensor,
    labels_T: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log p(label) under softmax(logits / temperature), and the entropy of that distribution.

    Args:
        logits_TV: float32 or bfloat16, columns [r V, (r+1) V) of rank r.
        labels_T: int64 in [0, vocab_size), the same on every rank of the group.
        vocab_size: columns from here on are padding and have probability 0.

    Returns:
        logprobs_T: float32, nats, differentiable; the same on every rank.
        entropy_T: float32, nats, detached; None unless asked for.
    """
    if logits_TV.ndim != 2 or labels_T.shape != logits_TV.shape[:1]:
        raise ValueError(f"logits {tuple(logits_TV.shape)} want shape [T, V], labels {tuple(labels_T.shape)} [T]")
    columns = logits_TV.shape[1]
    start = columns * tp_group.rank()
    real = min(max(vocab_size - start, 0), columns)
    logprobs_T, entropy_T = _VocabParallelLogprobs.apply(
        logits_TV, labels_T - start, real, temperature, tp_group, with_entropy
    )
    return logprobs_T, entropy_T if with_entropy else None


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        labels_T: Tensor,
        real: int,
        temperature: float,
        group: dist.ProcessGroup,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        """`labels_T` counts from this rank's first column; the first `real` columns are no padding."""
        tokens = logits_TV.shape[0]
        max_T = logits_TV.new_full((tokens,), -torch.inf, dtype=torch.float32)
        if real and tokens:
            max_T = logits_TV[:, :real].amax(-1).float() / temperature
        dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)
        mine_T = (labels_T >= 0) & (labels_T < real)
        # Rows: sum of exponentials; shifted logit of the label; sum of shifted logits weighted by their exponentials.
        sums_3T = logits_TV.new_zeros((3, tokens), dtype=torch.float32)
        for rows in _chunks(logits_TV):
            if not real:
                break
            shifted_CV = (logits_TV[rows, :real].float() / temperature).sub_(max_T[rows, None])
            label_C = shifted_CV.gather(1, labels_T[rows].clamp(0, real - 1)[:, None]).squeeze(1)
            sums_3T[1, rows] = label_C.masked_fill_(~mine_T[rows], 0.0)
            exp_CV = shifted_CV.exp() if with_entropy else shifted_CV.exp_()
            sums_3T[0, rows] = exp_CV.sum(-1)
            if with_entropy:
                sums_3T[2, rows] = shifted_CV.mul_(exp_CV).sum(-1)
        dist.all_reduce(sums_3T, group=group)
        exp_sum_T, label_T, weighted_T = sums_3T
        log_sum_T = exp_sum_T.log()
        ctx.save_for_backward(logits_TV, labels_T, mine_T, max_T + log_sum_T)
        ctx.real, ctx.temperature = real, temperature
        entropy_T = log_sum_T - weighted_T / exp_sum_T
        ctx.mark_non_differentiable(entropy_T)
        return label_T - log_sum_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """d log p(label) / d logit_v = (1[v = label] - p(v)) / temperature."""
        grad_T = grads[0] / ctx.temperature
        logits_TV, labels_T, mine_T, log_sum_T = ctx.saved_tensors
        grad_TV = torch.zeros_like(logits_TV) if ctx.real < logits_TV.shape[1] else torch.empty_like(logits_TV)
        for rows in _chunks(logits_TV):
            if not ctx.real:
                break
            grad_CV = (logits_TV[rows, : ctx.real].float() / ctx.temperature).sub_(log_sum_T[rows, None]).exp_()
            grad_CV.mul_(-grad_T[rows, None])
            label_C = labels_T[rows].clamp(0, ctx.real - 1)[:, None]
            grad_CV.scatter_add_(1, label_C, (grad_T[rows] * mine_T[rows])[:, None])
            grad_TV[rows, : ctx.real] = grad_CV
        return grad_TV, None, None, None, None, None


def _chunks(logits_TV: Tensor) -> list[slice]:
    tokens, columns = logits_TV.shape
    size = max(1, _CHUNK_ELEMENTS // max(1, columns))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
