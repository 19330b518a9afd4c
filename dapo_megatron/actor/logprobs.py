"""Computes log-probabilities from logits that are split over tensor-parallel ranks along the vocabulary.

T tokens, V the columns of this rank (padding included). Tokens go through in chunks of C, and only a chunk is ever held
in float32; what is summed up per token is float64. The backward pass writes the gradient over the logits, so that at
its peak the pass holds the logits and one chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Logits per chunk, one whole token at the least. On CPU a chunk (2 MiB in float32) stays in cache from one operation
to the next: with V = 4,096 and 152,064, on one thread and on two, that takes a third to a half of the time of chunks of
64 MiB; smaller ones gain little and cost more calls. A GPU wants few large kernels."""


class TokenLogprobs(NamedTuple):
    """What is known of each token, in float32, the same on every rank."""

    logprobs_T: Tensor
    """Log-probs of the labels, in nats; differentiable."""
    entropy_T: Tensor | None
    """Entropy of the distribution, in nats; detached. None unless asked for."""
    top_prob_T: Tensor | None
    """Probability of the most likely token; detached. None unless asked for."""


def vocab_parallel_logprobs(
    logits_TV: Tensor,
    labels_T: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
    with_stats: bool = False,
) -> TokenLogprobs:
    """Return log p(label) under softmax(logits / temperature); with_stats, also entropy and top probability, exactly.

    The backward pass overwrites `logits_TV` with its gradient: nobody may want the logits after it. Autograd notices
    who does (an operation that saved them, a second backward pass) and raises RuntimeError.

    Args:
        logits_TV: float32 or bfloat16, columns [r V, (r+1) V) of rank r.
        labels_T: int64 in [0, vocab_size), the same on every rank of the group.
        vocab_size: columns from here on are padding and have probability 0.
    """
    if logits_TV.ndim != 2 or labels_T.shape != logits_TV.shape[:1]:
        raise ValueError(f"logits {tuple(logits_TV.shape)} want shape [T, V], labels {tuple(labels_T.shape)} [T]")
    columns = logits_TV.shape[1]
    start = columns * tp_group.rank()
    real = min(max(vocab_size - start, 0), columns)
    return TokenLogprobs(
        *_VocabParallelLogprobs.apply(logits_TV, labels_T - start, real, temperature, tp_group, with_stats)
    )


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        labels_T: Tensor,
        real: int,
        temperature: float,
        group: dist.ProcessGroup,
        with_stats: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`labels_T` counts from this rank's first column; the first `real` columns are no padding."""
        tokens = logits_TV.shape[0]
        mine_T = (labels_T >= 0) & (labels_T < real)
        # Largest of this rank's columns. Where all are padding, it is finite so that its differences are.
        own_max_T = logits_TV.new_full((tokens,), torch.finfo(torch.float32).min, dtype=torch.float32)
        # Rows: sum of exponentials; sum of exponents weighted by these; logit of the label, where it is here.
        sums_3T = logits_TV.new_zeros((3, tokens), dtype=torch.float64)
        for rows in _chunks(logits_TV) if real else ():
            logits_CV = logits_TV[rows, :real]
            own_max_T[rows] = logits_CV.amax(-1)
            exponents_CV = _exponents(logits_CV.to(torch.float32, copy=True), own_max_T[rows], temperature)
            exp_CV = exponents_CV.exp() if with_stats else exponents_CV.exp_()
            sums_3T[0, rows] = exp_CV.sum(-1).double()
            if with_stats:
                sums_3T[1, rows] = exponents_CV.mul_(exp_CV).sum(-1).double()
            label_C = logits_CV.gather(1, labels_T[rows].clamp(0, real - 1)[:, None]).squeeze(1)
            sums_3T[2, rows] = label_C.double() * mine_T[rows]
        max_T = own_max_T.clone()
        dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)
        # From this rank's maximum to that of all.
        shift_T = (own_max_T.double() - max_T) / temperature
        sums_3T[1] += shift_T * sums_3T[0]
        sums_3T[:2] *= shift_T.exp()
        dist.all_reduce(sums_3T, group=group)
        exp_sum_T, weighted_T, label_T = sums_3T
        log_sum_T = exp_sum_T.log()
        ctx.save_for_backward(logits_TV, labels_T, mine_T, max_T, exp_sum_T)
        ctx.real, ctx.temperature = real, temperature
        logprobs_T = ((label_T - max_T) / temperature - log_sum_T).float()
        if not with_stats:
            return logprobs_T, None, None
        entropy_T, top_prob_T = (log_sum_T - weighted_T / exp_sum_T).float(), exp_sum_T.reciprocal().float()
        ctx.mark_non_differentiable(entropy_T, top_prob_T)
        return logprobs_T, entropy_T, top_prob_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Use d log p(label) / d logit_v = (1[v = label] - p(v)) / temperature."""
        logits_TV, labels_T, mine_T, max_T, exp_sum_T = ctx.saved_tensors
        real, temperature = ctx.real, ctx.temperature
        grad_T = grads[0] / temperature
        scale_T = (-grad_T / exp_sum_T).float()
        grad_TV = logits_TV.detach()
        grad_TV[:, real:] = 0
        for rows in _chunks(grad_TV) if real else ():
            grad_CV = grad_TV[rows, :real]
            work_CV = _exponents(grad_CV.float(), max_T[rows], temperature).exp_().mul_(scale_T[rows, None])
            label_C = labels_T[rows].clamp(0, real - 1)[:, None]
            work_CV.scatter_add_(1, label_C, (grad_T[rows] * mine_T[rows])[:, None])
            if work_CV is not grad_CV:
                grad_CV.copy_(work_CV)
        return grad_TV, None, None, None, None, None


def _exponents(logits_CV: Tensor, max_C: Tensor, temperature: float) -> Tensor:
    """Compute (logits - max) / temperature in place, in this order: the difference of close numbers is exact."""
    logits_CV.sub_(max_C[:, None])
    return logits_CV.div_(temperature) if temperature != 1 else logits_CV


def _chunks(logits_TV: Tensor) -> list[slice]:
    tokens, columns = logits_TV.shape
    size = max(1, _CHUNK_ELEMENTS[logits_TV.device.type] // max(1, columns))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
