"""What a loss is: one file of `algo.losses`, or of a user's own, that binds a `Loss`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dapo_megatron.config.section import Section
from dapo_megatron.measures import Mean, Measures

if TYPE_CHECKING:  # a configuration names losses, and is read without torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossInput:
    """The scored slots of one micro-batch: T of them, under context parallel those of this rank.

    Slots outside the loss hold 0, whatever the batch has there, and what a loss gives for them is ignored.
    """

    logprobs_T: Tensor
    """Nats; carries the gradient."""
    old_logprobs_T: Tensor
    """Nats: the policy before the first update of the step."""
    advantages_T: Tensor
    mask_T: Tensor
    """bool: in the loss."""
    cu_seqlens: Tensor
    """int32 [S+1]: sequence s has slots cu_seqlens[s] to cu_seqlens[s+1], under context parallel a part of it."""
    context_sum: Callable[[Tensor], Tensor]
    """Adds up a tensor over the ranks that share these sequences, forward and backward. Collective."""

    @property
    def log_ratio_T(self) -> Tensor:
        """Log of the probability ratio, policy to old policy; 0 outside the loss."""
        return self.logprobs_T - self.old_logprobs_T

    def sequence_means(self, values_T: Tensor) -> Tensor:
        """[T]: at each slot the mean over all loss tokens of its sequence, in the dtype of `values_T`. Collective.

        Where a sequence has no loss tokens, the sum, which is 0.
        """
        import torch

        from dapo_megatron.algo.segments import segment_sums, segments

        values_T = torch.where(self.mask_T, values_T, 0)
        parts = [segment_sums(x_T.double(), self.cu_seqlens) for x_T in (values_T, self.mask_T)]
        sums_S, tokens_S = self.context_sum(torch.stack(parts))
        means_S = sums_S / tokens_S.clamp(min=1)
        return means_S[segments(self.cu_seqlens, values_T.shape[0])].to(values_T.dtype)

    def share(self, chosen_T: Tensor) -> Mean:
        """Share of the loss tokens that are in `chosen_T`, bool."""
        return Mean((chosen_T & self.mask_T).sum(), self.mask_T.sum())


@dataclass(frozen=True)
class Loss:
    """One way to learn from advantages, as `algo.loss` names it.

    The mask, the weights of scope and correction, the KL term, the sum and its one division are the same for all losses
    and none of theirs (`algo.objective`).
    """

    settings: type[Section]
    """Its section of the configuration, `algo.NAME`; every setting has a default."""
    per_token: Callable[[LossInput, Any], tuple[Tensor, Measures]]
    """(input, settings) -> what is minimised at each slot, [T], before weights; and what was measured."""
    meanings: Mapping[str, str]
    """Metric -> meaning, for each that `per_token` measures."""
    reference: Callable[[Tensor, Tensor, float, Any], Tensor] | None = None
    """(policy, old policy, advantage, settings) -> what is maximised at each token of one response, [n].

    Log-probs float64 [n], nats, of its loss tokens alone. Written as the paper prints it, for `check-reduction`, and
    sharing no code with `per_token`.
    """
    bounds: Callable[[Any], tuple[float, ...]] = lambda settings: ()
    """Ratios beyond which something changes and that few tokens reach: `check-reduction` sends some there."""
