"""The sections of the loss and of the updates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, create_model, field_validator, model_validator

from dapo_megatron.config import named
from dapo_megatron.config.named import known
from dapo_megatron.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

if TYPE_CHECKING:
    from dapo_megatron.algo.loss import Loss


class KlConfig(Section):
    coef: NonNegativeFloat = 0.0
    """Weight of the KL term in the loss. 0 keeps no reference model in memory."""
    estimator: Literal["k2", "k3"] = "k3"
    """Estimator of KL(policy || reference) from the sampled tokens (Schulman, 2020). k1 is no choice: on the policy's
    own samples its gradient is 0 on average, and the term would only add noise."""


class CorrectionConfig(Section):
    """The engine samples from slightly other probabilities than the trainer computes; importance = trainer / engine."""

    kind: Literal["none", "truncated", "masked"] = "none"
    """Measure only; or weigh tokens by their importance up to `cap`; or weigh those inside `band` and mask the rest."""
    level: Literal["token", "sequence"] = "token"
    """Importance of each token by itself, or of the whole response (product over its tokens)."""
    cap: PositiveFloat = 2.0
    """With kind "truncated", importance above this counts as this."""
    band: tuple[PositiveFloat, PositiveFloat] = (0.5, 5.0)
    """With kind "masked", tokens of importance below the first or above the second leave numerator and denominator."""

    @model_validator(mode="after")
    def _band_has_two_ends(self) -> CorrectionConfig:
        if self.band[0] >= self.band[1]:
            raise ValueError(f"band must rise: {self.band[0]} is not below {self.band[1]}")
        return self


LOSSES = "dapo_megatron.algo.losses"


def loss_sections() -> dict[str, type[Section]]:
    """Return section of `algo` -> its settings, for every loss that is known by name; the default one first."""
    return {name: _loss(name).settings for name in sorted(known(LOSSES), key=lambda name: (name != "dapo", name))}


class AlgoConfig(Section):
    # Beside the fields, a section for each loss that is chosen or given settings.
    model_config = ConfigDict(extra="allow", json_schema_extra=lambda schema: _add_loss_sections(schema))

    loss: str = "dapo"
    """What is minimised: a file of dapo_megatron/algo/losses, or some.module:NAME. Its settings are algo.NAME."""
    loss_scope: Literal["token", "prompt", "sample", "constant"] = "token"
    """What weighs the same in the mean: every token of the mini-batch, every prompt, or every response (GRPO); or a
    token weighs 1 / (responses x scope_length), whatever the others are (Dr. GRPO)."""
    scope_length: PositiveInt | None = None
    """Tokens that each response counts for in scope "constant"; Dr. GRPO takes rollout.max_response_tokens."""
    advantage_std: Literal["unbiased", "population", "none"] = "unbiased"
    """What group-centred rewards are divided by."""
    advantage_eps: NonNegativeFloat = 1e-6
    """Added to that divisor."""
    kl: KlConfig = KlConfig()
    """Distance to a frozen reference."""
    correction: CorrectionConfig = CorrectionConfig()
    """What to do about the difference between the engine's probabilities and the trainer's."""

    @classmethod
    def key_types(cls) -> dict[str, Any]:
        return {**super().key_types(), **loss_sections()}

    @property
    def found_loss(self) -> Loss:
        """The loss that `loss` names."""
        return _loss(self.loss)

    @property
    def idle(self) -> list[str]:
        """Sections of losses that are given, but not chosen."""
        return [name for name in self.__pydantic_extra__ or {} if name != _section(self.loss)]

    @property
    def settings(self) -> Any:
        """The settings of that loss, an instance of its `Loss.settings`."""
        return (self.__pydantic_extra__ or {})[_section(self.loss)]

    @field_validator("loss")
    @classmethod
    def _loss_is_there(cls, loss: str) -> str:
        _loss(loss)
        section = _section(loss)
        if section in cls.model_fields or section.startswith("_") or (loss != section and section in known(LOSSES)):
            raise ValueError(
                f"{loss!r} would have its settings in algo.{section}, which cannot be or is taken; rename it"
            )
        return loss

    @model_validator(mode="before")
    @classmethod
    def _read_loss_sections(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        chosen = values.get("loss", cls.model_fields["loss"].default)
        try:
            own = {} if _section(chosen) in cls.model_fields else {_section(chosen).lstrip("_"): _loss(chosen).settings}
        except (ValueError, AttributeError):  # said of the field itself
            own = {}
        more = {name: value for name, value in values.items() if name not in cls.model_fields}
        kinds: dict[str, Any] = {name: kind for name, kind in (loss_sections() if more else {}).items() if name in more}
        fields: dict[str, Any] = {name: (kind, Field(default_factory=kind)) for name, kind in {**kinds, **own}.items()}
        sections = create_model("LossSections", __base__=Section, **fields).model_validate(more)
        return {**values, **{name: getattr(sections, name) for name in fields}}

    @model_validator(mode="after")
    def _length_goes_with_its_scope(self) -> AlgoConfig:
        if (self.loss_scope == "constant") != (self.scope_length is not None):
            raise ValueError(
                f"loss_scope={self.loss_scope!r} with scope_length={self.scope_length}: a constant scope needs a "
                f"length, such as rollout.max_response_tokens, and no other scope has one"
            )
        return self


@cache
def _loss(name: str) -> Loss:
    from dapo_megatron.algo.loss import Loss  # which itself needs this package

    return named.find(name, LOSSES, "LOSS", Loss)


def _section(loss: str) -> str:
    return loss.rpartition(":")[2]


def _add_loss_sections(schema: dict[str, Any]) -> None:
    for name, kind in loss_sections().items():
        schema["properties"][name] = kind.model_json_schema()
    schema["additionalProperties"] = False


class TrainConfig(Section):
    steps: NonNegativeInt = 330
    """Number of rollout steps."""
    mini_batch: PositiveInt = 512
    """Responses per update (optimizer step)."""
    micro_batch_tokens: PositiveInt = 32_768
    """Limit on the packed tokens of one forward pass, per context-parallel group."""
    logprob_tokens: PositiveInt | None = None
    """The same for passes that only compute log-probs, which need less memory; null runs them over the micro-batches of
    the update. Then the ratio of the first update is exactly 1, otherwise up to rounding (ratio/first_max)."""
    max_skipped_updates: PositiveInt = 3
    """Updates with a loss, ratio or gradient that is not finite are skipped; this many in a row end the run."""
    seed: int = 0
    """Seed of the order of prompts, of the mini-batches and of the engines."""


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
    """Decoupled weight decay of matrices; biases and norms have none."""
    clip_grad: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this; 0 is off."""
    precision_aware: bool = False
    """Of a float32 main parameter, keep only the 16 bits that the bfloat16 weight lacks: 2 bytes a number less, and the
    same update. The step is Transformer Engine's, on GPUs, for bfloat16 models and distributed optimizers."""
    exp_avg_dtype: Literal["float32", "bfloat16"] = "float32"
    """With precision_aware, what Adam's first moment is kept in between steps, which compute in float32."""
    exp_avg_sq_dtype: Literal["float32", "bfloat16"] = "float32"
    """The same for the second moment. In bfloat16 it wants betas[1] of 0.996 or less."""

    @model_validator(mode="after")
    def _moments_can_be_kept(self) -> OptimizerConfig:
        kept = {"exp_avg_dtype": self.exp_avg_dtype, "exp_avg_sq_dtype": self.exp_avg_sq_dtype}
        for name, dtype in kept.items():
            if dtype != "float32" and not self.precision_aware:
                raise ValueError(f"{name}={dtype} is for precision_aware=true, and it is off")
        # Half the gap below a bfloat16 number is 2^-9 to 2^-8 of it. What a step takes off must be more.
        if self.exp_avg_sq_dtype == "bfloat16" and 1 - self.betas[1] < 2**-8:
            raise ValueError(
                f"exp_avg_sq_dtype=bfloat16 with betas[1]={self.betas[1]:g}: a step without gradient takes "
                f"1 - {self.betas[1]:g} = {1 - self.betas[1]:.2g} off the second moment, and bfloat16 rounds less than "
                f"2^-8 = 0.0039 away: it would never decay; set betas=[{self.betas[0]:g},0.95], or keep it in float32"
            )
        return self

    @model_validator(mode="after")
    def _decay_leaves_something(self) -> OptimizerConfig:
        if self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"lr({self.lr:g}) x weight_decay({self.weight_decay:g}) = {self.lr * self.weight_decay:g}: a step "
                f"would take all of a weight away; the product must be below 1"
            )
        return self
