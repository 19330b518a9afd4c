"""The configuration of a run: one pydantic model per section, its constraints on the fields, the meaning beneath each.

Files and command lines are read by `config_file`.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from dapo_megatron.config.algo import AlgoConfig, CorrectionConfig, KlConfig, OptimizerConfig, TrainConfig
from dapo_megatron.config.checkpoint import CheckpointConfig
from dapo_megatron.config.evaluation import HELD_OUT, EvalConfig, EvalSetConfig, HeldOut
from dapo_megatron.config.model import LaunchConfig, MemoryConfig, ModelConfig, ParallelConfig
from dapo_megatron.config.reward import OverlongConfig, RewardConfig
from dapo_megatron.config.rollout import DataConfig, EngineConfig, RolloutConfig, WeightsConfig
from dapo_megatron.config.run import RunConfig
from dapo_megatron.config.section import Section

__all__ = [
    "HELD_OUT",
    "AlgoConfig",
    "CheckpointConfig",
    "Config",
    "CorrectionConfig",
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "EvalSetConfig",
    "HeldOut",
    "KlConfig",
    "LaunchConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OverlongConfig",
    "ParallelConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TrainConfig",
    "WeightsConfig",
]


class Config(Section):
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    memory: MemoryConfig = MemoryConfig()
    launch: LaunchConfig = LaunchConfig()
    rollout: RolloutConfig = RolloutConfig()
    engine: EngineConfig = EngineConfig()
    weights: WeightsConfig = WeightsConfig()
    reward: RewardConfig = RewardConfig()
    algo: AlgoConfig = Field(default_factory=AlgoConfig)
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()

    @property
    def max_sequence_tokens(self) -> int:
        """Tokens of the longest sequence that the engine or the actor can meet."""
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def weights_folder(self) -> Path:
        """Where versions of the weights are written, if they travel through a folder."""
        return self.weights.folder / self.run.name if self.weights.folder else self.run.folder / "weights"

    @property
    def offload(self) -> tuple[str, ...]:
        """What of the actor leaves its GPU while engines sample: names of memory.offload."""
        if self.memory.offload is not None:
            return tuple(self.memory.offload)
        return ("optimizer", "gradients", "parameters") if self.engine.sleeps else ()

    @property
    def sampling_seed(self) -> int:
        """From which the seeds of all requests are made."""
        return self.train.seed if self.engine.seed is None else self.engine.seed

    def samples_after(self, steps: int) -> bool:
        """Return whether a run that has done so many steps still needs engines: for a rollout or an evaluation."""
        return steps < self.train.steps or bool(self.held_out)

    @property
    def held_out(self) -> dict[str, HeldOut]:
        """The sets of held-out prompts by their names; that of eval.data is called `HELD_OUT`."""
        return self.eval.held_out(self.data, self.reward.rule)

    @model_validator(mode="after")
    def _optimizer_fits(self) -> Config:
        if self.optimizer.precision_aware and not self.parallel.distributed_optimizer:
            raise ValueError("optimizer.precision_aware needs parallel.distributed_optimizer, which is off")
        if self.optimizer.precision_aware and self.model.dtype != "bfloat16":
            raise ValueError(
                f"optimizer.precision_aware keeps what bfloat16 weights lack, but model.dtype is {self.model.dtype}; "
                f"leave it off"
            )
        return self

    @model_validator(mode="after")
    def _best_is_known(self) -> Config:
        name, every, sets = self.checkpoint.keep_best, self.checkpoint.every, self.held_out
        if name is None:
            return self
        if name not in sets:
            there = ", ".join(sets) or "none: neither eval.data nor eval.sets"
            raise ValueError(f"checkpoint.keep_best({name}) is no set of held-out prompts; there is {there}")
        if not every or not sets[name].every or sets[name].every % every:
            raise ValueError(
                f"checkpoint.keep_best({name}) wants a checkpoint at every evaluation of {name}, but it is evaluated "
                f"every {sets[name].every} steps, and checkpoint.every is {every}; make the first a multiple of the "
                f"second, and neither 0"
            )
        return self

    @model_validator(mode="after")
    def _time_fits(self) -> Config:
        hours, saving = self.run.max_hours, self.checkpoint.signal_seconds
        if hours is not None and hours * 3600 <= saving:
            raise ValueError(
                f"run.max_hours({hours:g}) is {hours * 3600:g} s, of which checkpoint.signal_seconds({saving:g}) are "
                f"for saving; nothing is left for training"
            )
        return self

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
            if self.parallel.ep > 1:
                raise ValueError(
                    f"train.logprob_tokens joins micro-batches, but with parallel.ep({self.parallel.ep}) ranks must "
                    f"have as many as those that they share out experts with; leave it out"
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
                f"fills {slots}; raise train.micro_batch_tokens to {-(-slots // unit) * unit} or more"
            )
        return self
