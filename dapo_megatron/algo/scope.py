"""Weighs tokens so that in the mean over a mini-batch every token, every prompt or every response weighs the same.

A mini-batch is spread over replicas: each counts its own segments (`counts`), the counts are summed, and from the sums
each weighs its own segments (`weights`). With N loss tokens in the mini-batch, sum(weight * loss) / N is:

- token: the mean over all tokens, as DAPO is usually run;
- prompt: the mean over prompts of the mean over a prompt's tokens (arXiv 2503.14476, eq. 8 to the letter);
- sample: the mean over responses of the mean over a response's tokens (GRPO, arXiv 2402.03300, eq. 3);
- constant: the sum over (responses x a fixed length), whatever their lengths are (Dr. GRPO, arXiv 2503.20783, which
  also leaves out the standard deviation: algo.advantage_std=none).

The weights sum to N, except for constant.

Prompts and responses without loss tokens count for nothing, above and below. Of a prompt whose responses are spread
over mini-batches, each mini-batch knows its own share.
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from torch import Tensor

Scope = Literal["token", "prompt", "sample", "constant"]


def counts(scope: Scope, tokens_S: Tensor, groups_S: Tensor, groups: int) -> Tensor:
    """Return what `weights` has to know of one replica's segments: float64, to be summed over replicas.

    Args:
        tokens_S: [S], the number of loss tokens of each segment; a segment with any is a response.
        groups_S: int64 [S], the group that each belongs to, below `groups`; looked at only where there are tokens.
    """
    tokens_S = tokens_S.double()
    match scope:
        case "token":
            return tokens_S.new_zeros(1)
        case "prompt":
            used_S = tokens_S > 0
            return tokens_S.new_zeros(groups).index_add_(0, groups_S[used_S], tokens_S[used_S])
        case "sample" | "constant":
            return (tokens_S > 0).sum(dtype=torch.float64)[None]
        case _:
            assert_never(scope)


def weights(
    scope: Scope, tokens_S: Tensor, groups_S: Tensor, totals: Tensor, loss_tokens: int, length: int | None = None
) -> Tensor:
    """Return the weight of a loss token of each segment, float64 [S]; 0 for a segment without any.

    Args:
        totals: `counts`, summed over replicas.
        loss_tokens: N, of all replicas.
        length: tokens that a response counts for, in scope constant.
    """
    tokens_S = tokens_S.double()
    match scope:
        case "token":
            weights_S = torch.ones_like(tokens_S)
        case "prompt":
            weights_S = loss_tokens / (totals > 0).sum(dtype=torch.float64) / totals[groups_S.clamp(min=0)]
        case "sample":
            weights_S = loss_tokens / totals / tokens_S
        case "constant":
            assert length, "scope constant needs a length"
            weights_S = (loss_tokens / totals / length).expand_as(tokens_S)
        case _:
            assert_never(scope)
    return torch.where(tokens_S > 0, weights_S, 0)
