"""Makes of a loss what the actor minimises: mask, KL term, weights and the sum are the same for every loss.

Nothing here divides: the reduction divides once, by the number of loss tokens of the mini-batch over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dapo_megatron.algo.kl import ESTIMATORS, k3
from dapo_megatron.algo.loss import Loss, LossInput
from dapo_megatron.algo.segments import check_slots
from dapo_megatron.config import AlgoConfig
from dapo_megatron.errors import LossError
from dapo_megatron.measures import Max, Mean, Measure, Measures
from dapo_megatron.types import MicroBatch, TokenLoss

COMMON = {"loss", "ratio/mean", "ratio/max", "kl/old", "kl/ref"}
"""What is measured of every loss."""


@dataclass(frozen=True)
class Objective:
    """The sum over loss tokens of weight * (loss + kl.coef * KL), with the loss that `algo.loss` names.

    It wants old log-probs in the batch, and the reference's where kl.coef > 0. Where anything of a loss token is not
    finite, the sum or a measure is not either, also where a clip hides it from the gradient.
    """

    config: AlgoConfig

    def __call__(
        self, logprobs_T: Tensor, batch: MicroBatch, context_sum: Callable[[Tensor], Tensor] = lambda part: part
    ) -> TokenLoss:
        """Compute the loss of one micro-batch, a sum, and measure it.

        Args:
            logprobs_T: [T], nats; carries the gradient. Slots outside the loss may hold anything, also nan.
            context_sum: adds up a tensor over the ranks that share the sequences of the batch; the default is for one.

        Returns:
            The sum in the dtype of `logprobs_T`, its number of tokens, and ratio/mean, ratio/max, kl/old (k3, old
            policy || policy), with a reference kl/ref (policy || reference, by kl.estimator), and the loss's own.
        """
        kl, mask_T = self.config.kl, batch.loss_mask_T
        check_slots(mask_T, logprobs_T, batch.old_logprobs_T, batch.advantages_T, batch.weights_T)
        assert batch.old_logprobs_T is not None, "the batch has no old log-probs; compute them before the first update"
        assert kl.coef == 0 or batch.ref_logprobs_T is not None, f"kl.coef = {kl.coef} needs the reference's log-probs"

        def masked(values_T: Tensor) -> Tensor:
            # Before any arithmetic: nan times 0 is nan, in the gradient too.
            return torch.where(mask_T, values_T, 0)

        new_T, old_T = masked(logprobs_T), masked(batch.old_logprobs_T)
        given = LossInput(new_T, old_T, masked(batch.advantages_T), mask_T, batch.cu_seqlens, context_sum)
        loss = self.config.found_loss
        loss_T, measures = self._checked(loss.per_token(given, self.config.settings), loss, mask_T)
        ratio_T, tokens = masked(given.log_ratio_T.detach().exp()), mask_T.sum()
        common: dict[str, Measure] = {
            "ratio/mean": Mean(ratio_T.sum(), tokens),
            "ratio/max": Max(ratio_T.amax()),
            "kl/old": Mean(k3(old_T, new_T.detach()).sum(), tokens),
        }
        if batch.ref_logprobs_T is not None:
            kl_T = ESTIMATORS[kl.estimator](new_T, masked(batch.ref_logprobs_T))
            common["kl/ref"] = Mean(kl_T.detach().sum(), tokens)
            if kl.coef:
                loss_T = loss_T + kl.coef * kl_T
        return TokenLoss(
            (masked(loss_T) * masked(batch.weights_T)).sum(),
            tokens,
            common | {name: measures[name] for name in loss.meanings},
        )

    def _checked(self, given: Any, loss: Loss, mask_T: Tensor) -> tuple[Tensor, Measures]:
        """Refuse what would be wrong without a word: a sum or a mean would be spread over all slots."""
        name = f"algo.loss={self.config.loss}"
        wanted = f"{name} must return a value for each of the {len(mask_T)} slots, and its measures"
        if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Tensor)):
            raise LossError(f"{wanted}; got {type(given).__name__}")
        loss_T, measures = given
        if loss_T.shape != mask_T.shape:
            raise LossError(f"{wanted}; got a tensor of shape {tuple(loss_T.shape)}. Neither add up nor average")
        # Ranks reduce measures together: one that is missing somewhere would hang them all.
        named = measures.keys() == loss.meanings.keys() and not measures.keys() & COMMON
        if not (named and all(isinstance(measure, Measure) for measure in measures.values())):
            raise LossError(
                f"{name} must measure what its meanings name, {sorted(loss.meanings)}, every "
                f"time, each as a Sum, Mean or Max, and none of {sorted(COMMON)}; got {dict(measures)}"
            )
        return loss_T, measures
