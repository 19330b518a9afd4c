"""Lets megatron-core and mbridge mean the CPU where they say "cuda".

Their modules get another object under the name `torch`: it answers `torch.cuda.*` and `device="cuda"` for the CPU and
passes everything else on. torch itself stays as it is for everyone else. Two habits of Megatron are methods of the
tensor, `t.type() == "torch.cuda.FloatTensor"` and `t.cuda()`; the functions that use them run inside
`_cuda_tensor_methods`, which changes these two methods for as long as the function runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_FACTORIES = ("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "eye")
_FACTORIES += ("zeros_like", "ones_like", "empty_like", "full_like")

_MODULES = (
    "parallel_state",
    "utils",
    "timers",
    "tensor_parallel.mappings",
    "tensor_parallel.layers",
    "tensor_parallel.random",
    "tensor_parallel.utils",
    "pipeline_parallel.schedules",
    "pipeline_parallel.p2p_communication",
    "models.gpt.gpt_model",
    "models.gpt.gpt_layer_specs",
    "models.common.language_module.language_module",
    "models.common.embeddings.rotary_pos_embedding",
    "models.common.embeddings.rope_utils",
    "transformer.attention",
    "transformer.moe.moe_layer",
    "transformer.moe.moe_utils",
    "transformer.moe.router",
    "transformer.moe.token_dispatcher",
    "transformer.transformer_layer",
    "transformer.transformer_block",
    "transformer.utils",
    "distributed.distributed_data_parallel",
    "distributed.param_and_grad_buffer",
    "distributed.finalize_model_grads",
    "optimizer",
    "optimizer.optimizer",
    "optimizer.distrib_optimizer",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.serialization",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.torch",
)


def install() -> None:
    """Import the modules that training needs and let each of them see the CPU."""
    for name in _MODULES:
        importlib.import_module(f"megatron.core.{name}")
    for name in ("util", "bridge"):
        importlib.import_module(f"mbridge.core.{name}")
    proxy = _TorchOnCpu()
    for name, module in list(sys.modules.items()):
        if name.startswith(("megatron.core", "mbridge")) and getattr(module, "torch", None) is torch:
            module.torch = proxy  # type: ignore[attr-defined]
    _wrap_tensor_methods()
    _use_local_kernels()
    dispatcher: Any = sys.modules["megatron.core.transformer.moe.token_dispatcher"]
    dispatcher.maybe_move_tensor_to_cpu = _as_sizes
    random: Any = sys.modules["megatron.core.tensor_parallel.random"]
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _use_local_kernels() -> None:
    """Give the optimizer torch's functions, where it found those of Transformer Engine or Apex, which need CUDA."""
    local: Any = sys.modules["megatron.core.utils"]
    clip: Any = sys.modules["megatron.core.optimizer.clip_grads"]
    steps: Any = sys.modules["megatron.core.optimizer.optimizer"]
    clip.multi_tensor_applier = steps.multi_tensor_applier = local.local_multi_tensor_applier
    clip.multi_tensor_scale_impl = steps.multi_tensor_scale_impl = local.local_multi_tensor_scale
    clip.l2_norm_impl = local.local_multi_tensor_l2_norm


def _as_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Give Megatron's dispatcher of tokens what it makes of tensors that have come from the GPU."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


class _Stream:
    """A queue of work that is always done."""

    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *args: Any) -> _Event:
        return _Event()


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...


class _CudaOnCpu(types.ModuleType):
    """What Megatron asks of `torch.cuda`."""

    Event = _Event

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        for name in ("synchronize", "empty_cache", "manual_seed_all", "set_device"):
            setattr(self, name, lambda *args, **kwargs: None)
        for name in ("Stream", "current_stream", "default_stream"):
            setattr(self, name, lambda *args, **kwargs: _Stream())
        self.current_device = lambda: torch.device("cpu")
        self.device_count = lambda: 1
        self.stream = lambda *args, **kwargs: contextlib.nullcontext()
        self.manual_seed = torch.manual_seed
        self.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        self.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _TorchOnCpu(types.ModuleType):
    """torch, except that "cuda" is the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))
        self.cuda = _CudaOnCpu()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


@contextlib.contextmanager
def _cuda_tensor_methods() -> Iterator[None]:
    """Let `tensor.type()` name the CUDA type and `tensor.cuda()` return the tensor."""
    original_type, original_cuda = torch.Tensor.type, torch.Tensor.cuda

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = type_  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.Tensor.type, torch.Tensor.cuda = original_type, original_cuda  # type: ignore[assignment]


def _wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _cuda_tensor_methods():
            return function(*args, **kwargs)

    return run


def _wrap_tensor_methods() -> None:
    core = "megatron.core."
    distributed: Any = sys.modules[core + "optimizer.distrib_optimizer"].DistributedOptimizer
    mixed: Any = sys.modules[core + "optimizer.optimizer"].Float16OptimizerWithFloat16Params
    language: Any = sys.modules[core + "models.common.language_module.language_module"].LanguageModule
    build_groups = distributed.__dict__["_build_model_and_main_param_groups"].__func__
    distributed._build_model_and_main_param_groups = classmethod(_wrapped(build_groups))
    mixed.__init__ = _wrapped(mixed.__init__)
    distributed.get_parameter_state_dp_zero = _wrapped(distributed.get_parameter_state_dp_zero)
    parallel: Any = sys.modules[core + "dist_checkpointing.strategies.fully_parallel"]
    parallel.exchange_by_distribution = _wrapped(parallel.exchange_by_distribution)
    # A tied embedding on two pipeline stages.
    language.setup_embeddings_and_output_layer = _wrapped(language.setup_embeddings_and_output_layer)
    for module in ("optimizer.clip_grads", "optimizer.optimizer"):  # the second has taken it in by name
        bound: Any = sys.modules[core + module]
        bound.clip_grad_by_total_norm_fp32 = _wrapped(bound.clip_grad_by_total_norm_fp32)
