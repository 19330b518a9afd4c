"""What weighs the same in the mean over a mini-batch: every token, every prompt, or every response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, assert_never

from dapo_megatron.types import TrainSample

Scope = Literal["token", "prompt", "sample"]


def token_weights(samples: Sequence[TrainSample], scope: Scope) -> list[float]:
    """Weight of each loss token of each sample of one mini-batch; the tokens of a sample weigh alike.

    The weights of the N loss tokens sum to N, so that sum(weight * loss) / N is the mean of the scope:

    - token: over all tokens, as DAPO is usually run;
    - prompt: over prompts, of the mean over a prompt's tokens (arXiv 2503.14476, eq. 8 to the letter);
    - sample: over responses, of the mean over a response's tokens (GRPO, arXiv 2402.03300, eq. 3).

    Prompts and responses without loss tokens count for nothing, above and below. Of a prompt whose responses are
    spread over mini-batches, each mini-batch knows its own share.
    """
    match scope:
        case "token":
            return [1.0] * len(samples)
        case "prompt":
            return _equal_parts([sample.group for sample in samples], [sample.loss_tokens for sample in samples])
        case "sample":
            return _equal_parts(list(range(len(samples))), [sample.loss_tokens for sample in samples])
        case _:
            assert_never(scope)


def _equal_parts(parts: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """Weights under which all parts with tokens weigh the same in total."""
    totals: dict[int, int] = {}
    for part, count in zip(parts, tokens, strict=True):
        if count:
            totals[part] = totals.get(part, 0) + count
    share = sum(totals.values()) / max(1, len(totals))
    return [share / totals[part] if count else 0.0 for part, count in zip(parts, tokens, strict=True)]
