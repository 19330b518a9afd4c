"""The loss, and the steps it takes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dapo_megatron.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class KlConfig(Section):
    coef: NonNegativeFloat = 0.0
    """Weight of the KL term in the loss. 0 keeps no reference model in memory."""
    estimator: Literal["k2", "k3"] = "k3"
    """Estimator of KL(policy || reference) from the sampled tokens (Schulman, 2020). k1 is no choice: on the policy's
    own samples its gradient is 0 on average, and the term would only add noise."""
    offload_reference: bool = False
    """Keep the reference in host memory between its uses, one per rollout."""


class CorrectionConfig(Section):
    """The engine samples from slightly other probabilities than the trainer computes; importance = trainer / engine."""

    kind: Literal["none", "truncated", "masked"] = "none"
    """Measure only; or weigh tokens by their importance up to `cap`; or weigh those inside `band` and mask the rest."""
    level: Literal["token", "sequence"] = "token"
    """Importance of each token by itself, or of the whole response (product over its tokens)."""
    cap: PositiveFloat = 2.0
    """Of kind "truncated": importance above this counts as this."""
    band: tuple[PositiveFloat, PositiveFloat] = (0.5, 5.0)
    """Of kind "masked": importance below the first or above the second leaves numerator and denominator."""

    @model_validator(mode="after")
    def _band_has_two_ends(self) -> CorrectionConfig:
        if self.band[0] >= self.band[1]:
            raise ValueError(f"band must rise: {self.band[0]} is not below {self.band[1]}")
        return self


class AlgoConfig(Section):
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Ratios below 1 - clip_low give no gradient where the advantage is negative."""
    clip_high: PositiveFloat = 0.28
    """Ratios above 1 + clip_high give no gradient where the advantage is positive (clip-higher)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Floor the objective at dual_clip x advantage where the advantage is negative. Paper: null; its code: 10."""
    loss_scope: Literal["token", "prompt", "sample"] = "token"
    """What weighs the same in the mean: every token of the mini-batch, every prompt, or every response (GRPO)."""
    advantage_std: Literal["unbiased", "population", "none"] = "unbiased"
    """What group-centred rewards are divided by."""
    advantage_eps: NonNegativeFloat = 1e-6
    """Added to that divisor."""
    kl: KlConfig = KlConfig()
    """Distance to a frozen reference."""
    correction: CorrectionConfig = CorrectionConfig()
    """What to do about the difference between the engine's probabilities and the trainer's."""


class TrainConfig(Section):
    steps: NonNegativeInt = 330
    """Rollout steps."""
    mini_batch: PositiveInt = 512
    """Responses per optimizer step."""
    micro_batch_tokens: PositiveInt = 32_768
    """Packed tokens of one forward pass at the most, per context-parallel group."""
    logprob_tokens: PositiveInt | None = None
    """The same for the passes without a backward pass, which need less memory; null runs them over the micro-batches of
    the update. Then the ratio of the first update is exactly 1, otherwise up to rounding (ratio/first_max)."""
    max_skipped_updates: PositiveInt = 3
    """Updates with a loss, ratio or gradient that is not finite are skipped; this many in a row end the run."""
    seed: int = 0
    """Of the order of prompts, of mini-batches and of the engines."""


class OptimizerConfig(Section):
    lr: PositiveFloat = 1e-6
    """Learning rate after the warm-up; constant from there on."""
    warmup_steps: NonNegativeInt = 10
    """Rollout steps of linear warm-up: step k runs at lr x (k+1)/warmup_steps."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Adam's decay of the first and the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of Adam's second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled, on matrices only."""
    clip_grad: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this; 0 is off."""

    @model_validator(mode="after")
    def _decay_leaves_something(self) -> OptimizerConfig:
        if self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"lr({self.lr:g}) x weight_decay({self.weight_decay:g}) = {self.lr * self.weight_decay:g}: a step "
                f"would take all of a weight away; the product must be below 1"
            )
        return self
