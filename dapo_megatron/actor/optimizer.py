"""AdamW over Megatron's gradient buffers, in two halves: measure, then step, so that a bad gradient changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import proxy

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import clip_grads, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from dapo_megatron.actor.model import DTYPES
from dapo_megatron.actor.weakly import weakly
from dapo_megatron.config import OptimizerConfig, ParallelConfig


def data_parallel(
    config: TransformerConfig,
    parallel: ParallelConfig,
    chunks: list[torch.nn.Module],
    groups: ProcessGroupCollection,
) -> list[DistributedDataParallel]:
    """Wrap model chunks so that gradients are summed (not averaged) over the ranks, in float32."""
    modules = [
        DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=parallel.distributed_optimizer,
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                overlap_param_gather=parallel.overlap_param_gather,
                # With several chunks, the schedule starts to gather each in time; otherwise a bucket starts the next.
                align_param_gather=len(chunks) > 1,
            ),
            chunk,
            disable_bucketing=index > 0,
            pg_collection=groups,
        )
        for index, chunk in enumerate(chunks)
    ]
    if parallel.overlap_grad_reduce:
        # Until the last micro-batch of an update, the backward pass only adds up.
        pauses = [weakly(module.no_sync) for module in modules]
        config.no_sync_func = pauses if len(pauses) > 1 else pauses[0]  # type: ignore[assignment]
    if parallel.overlap_param_gather and len(modules) > 1:
        config.param_sync_func = [partial(_start_gather, proxy(module)) for module in modules]  # type: ignore[assignment]
    return modules


def _start_gather(module: Any, *_: Any) -> None:
    for bucket in _bucket_groups(module):
        if not bucket.param_gather_dispatched:
            bucket.start_param_sync()


def gather_parameters(modules: Sequence[Any]) -> None:
    """Do at once what the next forward pass of these DDP modules would do, where overlap_param_gather left it to it.

    Collective. Until then each rank has the new values of those parameters alone that its own optimizer steps.
    """
    for bucket in (bucket for module in modules for bucket in _bucket_groups(module)):
        if bucket.ddp_config.overlap_param_gather and not bucket.param_gather_dispatched:
            bucket.start_param_sync(force_sync=True)


def build_optimizer(
    optimizer: OptimizerConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    chunks: list[DistributedDataParallel],
    groups: ProcessGroupCollection,
) -> Any:
    """Build Megatron's optimizer. Weight decay is for matrices; biases and norms have none."""
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
        use_precision_aware_optimizer=optimizer.precision_aware,
        exp_avg_dtype=DTYPES[optimizer.exp_avg_dtype],
        exp_avg_sq_dtype=DTYPES[optimizer.exp_avg_sq_dtype],
    )
    modules: Any = chunks
    return get_megatron_optimizer(config, modules, use_gloo_process_groups=False, pg_collection=groups)


def gradient_buffers(modules: Sequence[Any]) -> Iterator[torch.Tensor]:
    """Yield the buffers of these DDP modules in which gradients are summed."""
    return (buffer.grad_data for module in modules for buffer in _buffers(module))


def _buffers(module: Any) -> list[Any]:
    """Return those of a DDP module, of parameters that all replicas have and of experts that they share out."""
    return [*module.buffers, *module.expert_parallel_buffers]


def _bucket_groups(module: Any) -> list[Any]:
    return [*module.bucket_groups, *module.expert_parallel_bucket_groups]


def optimizer_state(optimizer: Any, besides: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield moments and main parameters, except those that lie in the memory of `besides`, the model's own."""
    model = {tensor.untyped_storage()._cdata for tensor in besides}
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        states = part.optimizer.state.values()
        moments = (value for state in states for value in state.values() if isinstance(value, torch.Tensor))
        params = (param for group in part.optimizer.param_groups for param in group["params"])
        yield from (tensor for tensor in (*moments, *params) if tensor.untyped_storage()._cdata not in model)


@contextmanager
def gradients_as_weights(modules: Sequence[Any]) -> Iterator[None]:
    """Let every parameter of these DDP modules hold, inside, its summed gradient instead of its value. Collective.

    The distributed optimizer leaves each rank only its part of the sums; the others' are fetched.
    """
    for buffer in (buffer for module in modules for buffer in _buffers(module)):
        group: Any = buffer.data_parallel_group
        if buffer.ddp_config.use_distributed_optimizer and group.size() > 1:
            for bucket in buffer.buckets:
                own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=group)
    params = [param for module in modules for param in module.parameters()]
    values = [param.data for param in params]
    try:
        for param in params:
            param.data = param.main_grad.to(param.dtype)
        yield
    finally:
        for param, value in zip(params, values, strict=True):
            param.data = value


@torch.no_grad()
def gradient_norm(optimizer: Any) -> float:
    """Return the norm of the summed gradients. No parameter changes; `apply_gradient` comes next, or nothing."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def apply_gradient(optimizer: Any, settings: OptimizerConfig, *, lr: float, grad_norm: float) -> None:
    """Clip by `grad_norm`, which must be finite, and update the parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        # Megatron leaves this to its scheduler, without which the groups with wd_mult 0 would decay.
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
        # A run that goes on has loaded those that it was saved with.
        group["betas"], group["eps"] = settings.betas, settings.eps
    for part in optimizer.chained_optimizers:
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if parameters and settings.clip_grad > 0:
            clip_grads.clip_grad_by_total_norm_fp32(
                parameters, settings.clip_grad, grad_norm, use_decoupled_grad=settings.precision_aware
            )
    optimizer.step_with_ready_grads()
