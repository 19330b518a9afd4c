"""AdamW over Megatron's gradient buffers: one step, or an error."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import clip_grads, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from dapo_megatron.config import OptimizerConfig, ParallelConfig
from dapo_megatron.errors import DapoError


class GradientError(DapoError, RuntimeError):
    """The gradient is infinite or not a number; no parameter was touched."""


def data_parallel(
    config: TransformerConfig, parallel: ParallelConfig, chunks: list[torch.nn.Module]
) -> list[DistributedDataParallel]:
    """Wrap model chunks so that gradients are summed (not averaged) over the ranks, in float32."""
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.distributed_optimizer, grad_reduce_in_fp32=True
    )
    return [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(
    optimizer: OptimizerConfig, parallel: ParallelConfig, dtype: torch.dtype, chunks: list[DistributedDataParallel]
) -> Any:
    """Megatron's optimizer. Weight decay is for matrices; biases and norms have none."""
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
    )
    return get_megatron_optimizer(config, chunks)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def optimizer_step(optimizer: Any, settings: OptimizerConfig, lr: float) -> float:
    """Clip the summed gradients and update the parameters. Returns the gradient norm before clipping.

    Raises:
        GradientError: where the norm is not finite; checked before anything is changed.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        # Megatron leaves this to its scheduler, without which the groups with wd_mult 0 would decay.
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        raise GradientError(f"the gradient norm is {grad_norm}; the parameters are those of before this step")
    for part in optimizer.chained_optimizers:
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if parameters and settings.clip_grad > 0:
            clip_grads.clip_grad_by_total_norm_fp32(parameters, max_norm=settings.clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()
    return grad_norm
