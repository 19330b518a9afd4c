"""What the actor minimises, behind signatures that tell it nothing of the algorithm."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dapo_megatron.algo.likelihood import likelihood_loss
from dapo_megatron.algo.loss import dapo_loss
from dapo_megatron.config import AlgoConfig
from dapo_megatron.types import MicroBatch, TokenLoss


@dataclass(frozen=True)
class DapoLoss:
    """`dapo_loss` as configured. Wants old log-probs in the batch, and the reference's where kl.coef > 0."""

    config: AlgoConfig

    def __call__(self, logprobs_T: Tensor, batch: MicroBatch) -> TokenLoss:
        assert batch.old_logprobs_T is not None, "the batch has no old log-probs; compute them before the first update"
        return dapo_loss(
            logprobs_T,
            batch.old_logprobs_T,
            batch.advantages_T,
            batch.loss_mask_T,
            clip_low=self.config.clip_low,
            clip_high=self.config.clip_high,
            dual_clip=self.config.dual_clip,
            weights_T=batch.weights_T,
            ref_logprobs_T=batch.ref_logprobs_T,
            kl_coef=self.config.kl.coef,
            kl_estimator=self.config.kl.estimator,
        )


@dataclass(frozen=True)
class LikelihoodLoss:
    """`likelihood_loss`, for supervised training."""

    def __call__(self, logprobs_T: Tensor, batch: MicroBatch) -> TokenLoss:
        return likelihood_loss(logprobs_T, batch.loss_mask_T, batch.weights_T)
