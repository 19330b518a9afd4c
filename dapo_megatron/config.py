"""The configuration of a run: one pydantic model per section, its constraints on the fields, the meaning beneath each.

Files and command lines are read by `config_file`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dapo_megatron.errors import ConfigError

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelConfig(Section):
    path: Path
    """Folder of a Hugging Face checkpoint: config.json, *.safetensors and the tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameters and activations of the actor, and of the engine."""
    trust_remote_code: bool = False
    """Run Python code that a checkpoint brings along. Off unless you wrote that code."""
    recompute: Literal["none", "full"] = "none"
    """Recompute each layer's activations in the backward pass to save memory."""


class ParallelConfig(Section):
    tp: PositiveInt = 1
    """Tensor-parallel size of the actor."""
    pp: PositiveInt = 1
    """Pipeline-parallel size of the actor."""
    vpp: PositiveInt = 1
    """Model chunks of each pipeline stage (virtual pipeline, interleaved 1F1B); 1 is the plain 1F1B schedule."""
    cp: PositiveInt = 1
    """Context-parallel size of the actor."""
    sequence_parallel: bool = False
    """Split activations along the sequence between tensor-parallel ranks."""
    distributed_optimizer: bool = True
    """Split the optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients bucket by bucket while the backward pass still runs."""

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.pp * self.cp

    @property
    def sequence_multiple(self) -> int:
        """Slots of a packed sequence are a multiple of this: each context-parallel rank takes two chunks of it."""
        return 2 * self.cp if self.cp > 1 else 1

    @property
    def total_multiple(self) -> int:
        """Slots of a micro-batch on one context-parallel rank are a multiple of this."""
        return self.tp if self.sequence_parallel else 1

    @property
    def micro_batch_multiple(self) -> int:
        """Micro-batches of an update are a multiple of this: the interleaved schedule sends them in rounds of pp."""
        return self.pp if self.vpp > 1 else 1

    @model_validator(mode="after")
    def _sizes_make_sense(self) -> ParallelConfig:
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("sequence_parallel splits between tensor-parallel ranks, but tp is 1; set tp=2 or more")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"vpp({self.vpp}) splits pipeline stages into chunks, but pp is 1; set pp=2 or more")
        return self

    def data_parallel(self, world_size: int) -> int:
        """Copies of the model in `world_size` ranks.

        Raises:
            ConfigError: where tp x pp x cp does not divide the world.
        """
        if world_size % self.model_size:
            raise ConfigError(
                f"parallel: tp({self.tp}) x pp({self.pp}) x cp({self.cp}) = {self.model_size} does not divide world "
                f"size {world_size}; start a multiple of {self.model_size} ranks or choose smaller sizes"
            )
        return world_size // self.model_size


class LaunchConfig(Section):
    processes: PositiveInt = 1
    """Ranks that `dapo-megatron train` starts on this machine. Under torchrun, torchrun decides."""
    threads: PositiveInt = 1
    """CPU threads of each rank that `dapo-megatron train` starts, whatever OMP_NUM_THREADS it was started with."""


class DataConfig(Section):
    train: str
    """Prompts to train on: a .jsonl or .parquet file, or hub:OWNER/NAME[/SPLIT] on the Hugging Face hub."""
    prompt_field: str = "prompt"
    """Where a row keeps its question; dots reach into nested objects. Of chat messages, the last user turn."""
    answer_field: str = "answer"
    """Where a row keeps the gold answer; dots reach into nested objects (reward_model.ground_truth)."""
    template: str = "{problem}"
    """Text around the question, which replaces {problem}."""
    chat_template: bool = False
    """Wrap the result as one user turn in the tokenizer's chat template."""
    max_prompt_tokens: PositiveInt = 2048
    """Limit on the tokens of a prompt."""
    long_prompts: Literal["refuse", "drop"] = "refuse"
    """What to do with a longer prompt: stop before the run starts, or leave it out and say how many were."""

    @model_validator(mode="after")
    def _template_has_a_place(self) -> DataConfig:
        if "{problem}" not in self.template:
            raise ValueError(f"template must hold {{problem}} where the question goes; got {self.template!r}")
        return self


class RolloutConfig(Section):
    prompts: PositiveInt = 512
    """Groups to train on per step (N of the paper)."""
    responses: Annotated[int, Field(ge=2)] = 16
    """Responses per prompt (G of the paper). An advantage compares responses, so one is not enough."""
    max_response_tokens: PositiveInt = 20_480
    """Cap on generated tokens, the end token included."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the trainer computes its log-probs at the same."""
    top_p: Fraction = 1.0
    """Nucleus sampling; 1 is off. The trainer's log-probs are those of the full distribution."""
    stop_token_ids: list[int] = []
    """Tokens that end a response besides the tokenizer's end token."""
    dynamic_sampling: bool = True
    """Train only on groups that are neither all right nor all wrong, and draw prompts until there are enough."""
    generation_batch: PositiveInt | None = None
    """Prompts drawn at a time; null means as many as `prompts`."""
    max_generation_batches: PositiveInt = 10
    """How often to draw before giving up."""
    too_few_groups: Literal["raise", "train"] = "raise"
    """When that is not enough: end the run with the counts, or train on the groups there are."""
    surplus_groups: Literal["discard", "carry"] = "discard"
    """Mixed groups beyond `prompts`: thrown away as published, or trained on in the next step, off-policy."""

    @model_validator(mode="after")
    def _filling_needs_dynamic_sampling(self) -> RolloutConfig:
        filling = ("generation_batch", "max_generation_batches", "too_few_groups", "surplus_groups")
        defaults = {name: type(self).model_fields[name].default for name in filling}
        idle = [f"{name}={value!r}" for name in filling if (value := getattr(self, name)) != defaults[name]]
        if idle and not self.dynamic_sampling:
            raise ValueError(
                f"{', '.join(idle)} would do nothing: with dynamic_sampling=false one batch of `prompts` is taken as "
                f"it comes; leave out what fills a batch, or set dynamic_sampling=true"
            )
        return self

    @property
    def batch_size(self) -> int:
        """Responses per step."""
        return self.prompts * self.responses

    @property
    def draw(self) -> int:
        """Prompts per generation batch."""
        return self.generation_batch or self.prompts


class EngineConfig(Section):
    kind: Literal["vllm"] = "vllm"
    """What serves the policy for sampling."""
    replicas: PositiveInt = 1
    """Engine processes, each with its own copy of the model; requests go to them in turn."""
    tensor_parallel: PositiveInt = 1
    """GPUs of each replica."""
    host: str = "127.0.0.1"
    """Address that engines listen on. Anything but loopback lets others read prompts and change the weights."""
    port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """Port of the first replica, the next ones follow; null takes free ports."""
    max_sequences: PositiveInt = 512
    """Sequences that one replica decodes at once."""
    memory_fraction: Fraction = 0.85
    """Share of each GPU's memory for the engine."""
    cpu_kv_gib: PositiveInt = 1
    """GiB for the KV cache on CPU."""
    startup_seconds: PositiveFloat = 600.0
    """How long an engine may take until it answers."""
    request_seconds: PositiveFloat = 3600.0
    """How long one generation request may take."""
    extra_args: list[str] = []
    """More arguments for the engine's own command line."""
    seed: int | None = None
    """Seed of the engine's sampler; null takes train.seed."""


class WeightsConfig(Section):
    transport: Literal["gloo"] = "gloo"
    """How weights travel from the actor to the engines."""
    bucket_mib: PositiveInt = 64
    """Tensors are sent in buckets of about this size."""


class OverlongConfig(Section):
    punishment: bool = True
    """Soft overlong punishment: the reward falls linearly to -weight over the last `cache` tokens (paper, eq. 13)."""
    cache: PositiveInt = 4096
    """Tokens before the cap over which the punishment grows."""
    weight: NonNegativeFloat = 1.0
    """Punishment of a response that uses the whole cap."""
    filter: bool = False
    """Overlong filtering: tokens of truncated responses leave the loss, numerator and denominator alike."""


class RewardConfig(Section):
    rule: Literal["dapo", "lenient", "math_verify"] = "dapo"
    """How answers are judged: the published string rule, a forgiving one, or symbolic comparison."""
    right: float = 1.0
    """Reward of a right answer."""
    wrong: float = -1.0
    """Reward of a wrong one, and of none."""
    format: Literal["none", "r1"] = "none"
    """Extra reward for <think>...</think><answer>...</answer>, as in R1."""
    format_weight: NonNegativeFloat = 0.5
    """Added when the format is kept, subtracted when it is not."""
    truncated_is_wrong: bool = False
    """Grade a truncated response as wrong even where its answer is right. The published run did not."""
    overlong: OverlongConfig = OverlongConfig()
    """What becomes of responses near the cap."""
    workers: PositiveInt = 2
    """Processes that grade; one is killed and replaced when an answer takes too long."""
    timeout_seconds: PositiveFloat = 5.0
    """Wall-clock limit on grading one answer. Beyond it the answer counts as wrong."""

    @model_validator(mode="after")
    def _right_beats_wrong(self) -> RewardConfig:
        if self.right <= self.wrong:
            raise ValueError(f"right ({self.right}) must be more than wrong ({self.wrong})")
        return self


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


class EvalConfig(Section):
    data: str | None = None
    """Held-out prompts, read like data.train; null leaves evaluation out."""
    every: NonNegativeInt = 0
    """Rollout steps between evaluations; 0 evaluates only before the first step and after the last."""
    samples: PositiveInt = 1
    """Responses per prompt; the accuracy is their mean."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Fraction = 1.0
    """Nucleus sampling; 1 is off. The paper's evaluation used 0.7."""

    def due(self, step: int) -> bool:
        """Whether to evaluate after `step` steps are done."""
        return self.data is not None and self.every > 0 and step % self.every == 0


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Results go to dir/name."""
    dir: Path = Path("runs")
    """Folder that runs are kept in."""
    existing: Literal["refuse", "rename"] = "refuse"
    """When dir/name is there already: stop, or move it aside to dir/name.1, .2, ..."""
    save_hf: bool = True
    """Write the trained policy as a Hugging Face checkpoint to dir/name/hf."""
    sampled_groups: NonNegativeInt = 4
    """Groups per step whose responses are written to rollouts.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard events to dir/name."""
    wandb_project: str | None = None
    """Also log to Weights & Biases (needs the wandb extra)."""
    mlflow_uri: str | None = None
    """Also log to this MLflow tracking server or folder (needs the mlflow extra)."""

    @property
    def folder(self) -> Path:
        return self.dir / self.name


class Config(Section):
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    launch: LaunchConfig = LaunchConfig()
    rollout: RolloutConfig = RolloutConfig()
    engine: EngineConfig = EngineConfig()
    weights: WeightsConfig = WeightsConfig()
    reward: RewardConfig = RewardConfig()
    algo: AlgoConfig = AlgoConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    run: RunConfig = RunConfig()

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence that the engine or the actor can meet."""
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def updates_per_step(self) -> int:
        return self.rollout.batch_size // self.train.mini_batch

    @model_validator(mode="after")
    def _sizes_fit(self) -> Config:
        rollout, train, overlong = self.rollout, self.train, self.reward.overlong
        if rollout.batch_size % train.mini_batch:
            raise ValueError(
                f"train.mini_batch({train.mini_batch}) does not divide rollout.prompts({rollout.prompts}) x "
                f"rollout.responses({rollout.responses}) = {rollout.batch_size}"
            )
        if overlong.punishment and overlong.cache > rollout.max_response_tokens:
            raise ValueError(
                f"reward.overlong.cache({overlong.cache}) is more than rollout.max_response_tokens"
                f"({rollout.max_response_tokens}): the punishment would start before the first token; "
                f"set a smaller cache or reward.overlong.punishment=false"
            )
        if train.logprob_tokens is not None:
            if train.logprob_tokens < train.micro_batch_tokens:
                raise ValueError(
                    f"train.logprob_tokens({train.logprob_tokens}) is less than train.micro_batch_tokens"
                    f"({train.micro_batch_tokens}): micro-batches are joined for these passes, never cut; raise it or "
                    f"leave it out"
                )
            if self.parallel.vpp > 1:
                raise ValueError(
                    f"train.logprob_tokens joins micro-batches, but with parallel.vpp({self.parallel.vpp}) they must "
                    f"stay a multiple of pp({self.parallel.pp}); leave it out"
                )
        # A sequence of L tokens fills L-1 slots; `pack` rounds those up and the budget down.
        slots = -(-(self.max_sequence_tokens - 1) // self.parallel.sequence_multiple) * self.parallel.sequence_multiple
        unit = self.parallel.sequence_multiple * self.parallel.total_multiple
        budget = train.micro_batch_tokens // unit * unit
        if budget < slots:
            raise ValueError(
                f"train.micro_batch_tokens({train.micro_batch_tokens}) holds {budget} slots in multiples of {unit}; "
                f"the longest sequence, data.max_prompt_tokens({self.data.max_prompt_tokens}) + "
                f"rollout.max_response_tokens({rollout.max_response_tokens}) = {self.max_sequence_tokens} tokens, "
                f"fills {slots}"
            )
        return self
