"""AdamW with the state layout of Transformer Engine's FusedAdam, so that Megatron's distributed optimizer saves and
loads it the way it does on GPU: the step count lives in the parameter group, not beside each parameter.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import torch

_foreach: Any = torch
"""torch's own `_foreach_*` functions, which one call applies to a list of tensors."""


class FusedLayoutAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba, 2015) with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        assert adam_w_mode, "only decoupled weight decay"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param].update(exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
        grads: Any = [param.grad for param in params]
        first = [self.state[param]["exp_avg"] for param in params]
        second = [self.state[param]["exp_avg_sq"] for param in params]
        beta1, beta2 = group["betas"]
        lr, decay, step = group["lr"], group["weight_decay"], group["step"]
        if decay:
            _foreach._foreach_mul_(params, 1 - lr * decay)
        _foreach._foreach_lerp_(first, grads, 1 - beta1)
        _foreach._foreach_mul_(second, beta2)
        _foreach._foreach_addcmul_(second, grads, grads, 1 - beta2)
        denominator = _foreach._foreach_sqrt(second)
        _foreach._foreach_div_(denominator, math.sqrt(1 - beta2**step))
        _foreach._foreach_add_(denominator, group["eps"])
        _foreach._foreach_addcdiv_(params, first, denominator, -lr / (1 - beta1**step))


def install() -> None:
    """Make FusedLayoutAdam the Adam that Megatron builds."""
    optimizer: Any = sys.modules["megatron.core.optimizer"]
    distributed: Any = sys.modules["megatron.core.optimizer.distrib_optimizer"]
    optimizer.Adam = distributed.Adam = FusedLayoutAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True
