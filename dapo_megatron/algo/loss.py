"""Says what a loss is: a file of `algo.losses`, or of a user's own, binds a `Loss`."""

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
    """What a loss sees of one micro-batch: its T scored slots, under context parallel those of this rank.

    Slots outside the loss hold 0, and what a loss gives for them is ignored.
    """

    logprobs_T: Tensor
    """Log-probs of the labels, in nats; they carry the gradient."""
    old_logprobs_T: Tensor
    """Log-probs of the labels under the policy at the start of the step, in nats."""
    advantages_T: Tensor
    mask_T: Tensor
    """bool: which slots are in the loss."""
    cu_seqlens: Tensor
    """int32 [S+1]: slots cu_seqlens[s] to cu_seqlens[s+1] are of sequence s, under context parallel a part of it."""
    context_sum: Callable[[Tensor], Tensor]
    """Adds up a tensor over the ranks that share these sequences, and its gradient. Collective in both directions:
    whether a loss calls it must not depend on the data."""

    @property
    def log_ratio_T(self) -> Tensor:
        """The log of the probability ratio, policy to old policy, [T]; 0 outside the loss."""
        return self.logprobs_T - self.old_logprobs_T

    def sequence_means(self, values_T: Tensor) -> Tensor:
        """Return the mean over all loss tokens of each slot's sequence, [T], in the dtype of `values_T`. Collective.

        A sequence without loss tokens has mean 0.
        """
        import torch

        from dapo_megatron.algo.segments import segment_sums, segments

        values_T = torch.where(self.mask_T, values_T, 0)
        parts = [segment_sums(x_T.double(), self.cu_seqlens) for x_T in (values_T, self.mask_T)]
        sums_S, tokens_S = self.context_sum(torch.stack(parts))
        means_S = sums_S / tokens_S.clamp(min=1)
        return means_S[segments(self.cu_seqlens, values_T.shape[0])].to(values_T.dtype)

    def share(self, chosen_T: Tensor) -> Mean:
        """Measure which share of the loss tokens is in `chosen_T`, bool [T]."""
        return Mean((chosen_T & self.mask_T).sum(), self.mask_T.sum())


@dataclass(frozen=True)
class Loss:
    """One way to learn from advantages, as `algo.loss` names it.

    The mask, the weights of scope and correction, the KL term, the sum and its one division are not its business: they
    are the same for all losses (`algo.objective`).
    """

    settings: type[Section]
    """The model of its section of the configuration, `algo.NAME`; every setting has a default."""
    per_token: Callable[[LossInput, Any], tuple[Tensor, Measures]]
    """(input, settings) -> what is minimised at each slot, [T], before weights; and what was measured."""
    meanings: Mapping[str, str]
    """Metric -> meaning. `per_token` measures all of these and no others, on every call."""
    reference: Callable[[Tensor, Tensor, float, Any], Tensor] | None = None
    """(policy, old policy, advantage, settings) -> what is maximised at each token of one response, [n].

    The log-probs are float64 [n], in nats, of its loss tokens alone. `check-reduction` compares with it: it is written
    as the paper prints it, and shares no code with `per_token`.
    """
    bounds: Callable[[Any], tuple[float, ...]] = lambda settings: ()
    """settings -> ratios that few tokens reach and where the loss changes: `check-reduction` sends some beyond."""

    def __post_init__(self) -> None:
        if not (isinstance(self.settings, type) and issubclass(self.settings, Section)):
            raise TypeError(f"Loss.settings is {self.settings!r}; expected a class derived from config.section.Section")
        if missing := [name for name, field in self.settings.model_fields.items() if field.is_required()]:
            raise TypeError(f"every setting of a loss needs a default; {', '.join(missing)} has none")
