"""The sections of the model and of how ranks share it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dapo_megatron.config.section import FilePath, PositiveInt, Section
from dapo_megatron.errors import ConfigError


class ModelConfig(Section):
    path: FilePath
    """Folder of a Hugging Face checkpoint: config.json, *.safetensors and the tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the parameters and activations of the actor and of the engine."""
    trust_remote_code: bool = False
    """Run Python code that a checkpoint brings along. Off unless you wrote that code."""
    layers: Literal["transformer_engine", "torch"] | None = None
    """What layers are made of: Transformer Engine's fused modules, or torch's own functions, which run anywhere and are
    slower. Null takes Transformer Engine where there are GPUs, and torch on CPU."""


class MemoryConfig(Section):
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it: `recompute_modules`, or whole layers."""
    recompute_modules: list[Literal["core_attn", "mlp"]] = ["mlp"]
    """With recompute=selective. Transformer Engine's attention keeps little anyway; there, `mlp` saves memory."""
    recompute_layers: PositiveInt | None = None
    """With recompute=full, how many layers of each model chunk; null is all of them."""
    offload: list[Literal["optimizer", "gradients", "parameters"]] | None = None
    """What lies in (pinned) host memory while engines sample, such as [optimizer,gradients]: optimizer state, or
    parameters; gradients are only let go. Null is all three where engines sleep meanwhile (engine.sleep), and otherwise
    nothing."""
    offload_reference: bool = False
    """Keep the reference model in host memory between its uses, one per rollout."""

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> MemoryConfig:
        if self.recompute_layers is not None and self.recompute != "full":
            raise ValueError(f"recompute_layers is for recompute=full, but recompute is {self.recompute}")
        if self.recompute != "selective" and self.recompute_modules != ["mlp"]:
            raise ValueError(f"recompute_modules is for recompute=selective, but recompute is {self.recompute}")
        if self.recompute == "selective" and not self.recompute_modules:
            raise ValueError("recompute=selective recomputes recompute_modules, and there are none; set recompute=none")
        for name in ("offload", "recompute_modules"):
            named: list[str] = getattr(self, name) or []
            if len(set(named)) < len(named):
                raise ValueError(f"{name} names the same twice: {', '.join(named)}")
        return self


class ParallelConfig(Section):
    tp: PositiveInt = 1
    """Tensor-parallel size of the actor."""
    pp: PositiveInt = 1
    """Pipeline-parallel size of the actor."""
    vpp: PositiveInt = 1
    """Model chunks of each pipeline stage (virtual pipeline, interleaved 1F1B); 1 is the plain 1F1B schedule."""
    cp: PositiveInt = 1
    """Context-parallel size of the actor."""
    ep: PositiveInt = 1
    """Expert-parallel size of the actor: so many ranks, which replicas and context parallel have anyway, share out the
    experts of each layer. All else of the model each of them has."""
    sequence_parallel: bool = False
    """Split activations along the sequence between tensor-parallel ranks."""
    distributed_optimizer: bool = True
    """Split the optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients bucket by bucket while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather what the replicas' distributed optimizers stepped bucket by bucket, while the next forward pass runs."""

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
        for needed in ("distributed_optimizer", "overlap_grad_reduce") if self.overlap_param_gather else ():
            if not getattr(self, needed):
                raise ValueError(f"overlap_param_gather needs {needed}, which is off; set {needed}=true")
        return self

    def data_parallel(self, world_size: int) -> int:
        """Return how many copies of the model `world_size` ranks hold.

        Raises:
            ConfigError: where tp x pp x cp does not divide the world, or ep what data and context parallel have of it.
        """
        if world_size % self.model_size:
            raise ConfigError(
                f"parallel: tp({self.tp}) x pp({self.pp}) x cp({self.cp}) = {self.model_size} does not divide world "
                f"size {world_size}; start a multiple of {self.model_size} ranks or choose smaller sizes"
            )
        dp = world_size // self.model_size
        if dp * self.cp % self.ep:
            raise ConfigError(
                f"parallel: ep({self.ep}) does not divide dp({dp}) x cp({self.cp}) = {dp * self.cp}, the ranks that "
                "experts are shared out to; start more ranks or choose a smaller ep"
            )
        return dp


class LaunchConfig(Section):
    processes: PositiveInt = 1
    """Ranks that `dapo-megatron train` starts on this machine. Under torchrun, torchrun decides."""
    threads: PositiveInt = 1
    """CPU threads of each rank that `dapo-megatron train` starts, whatever OMP_NUM_THREADS it was started with."""
    collective_seconds: Annotated[float, Field(ge=1, le=1e9)] = 600.0
    """How long ranks wait for one another in a collective. What the leader does alone, a rollout for example, has no
    limit here, and neither has reading the weights of model.path. Reading a checkpoint of the run has: ranks begin it
    together, and the last is to have read its part within this time of the first."""
    join_seconds: Annotated[float, Field(ge=1, le=1e9)] = 1800.0
    """How long ranks wait for one another at the start, while machines pull images and read their software. How long
    torchrun waits before it starts any is its own: `--rdzv-conf join_timeout=...`."""
    lost_seconds: Annotated[float, Field(ge=1, le=1e6)] = 30.0
    """A rank from which nothing was heard for so long counts as lost and ends the run; every fifth of it, ranks send a
    sign of life."""
    heartbeat_port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """Where the leader listens for these, for a firewall to let through; null is any free port."""
