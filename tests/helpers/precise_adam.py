"""Stands in for Transformer Engine's FusedAdam on CPU, as Megatron's precision-aware optimizer uses it.

Arguments, state and the order of operations are those of Transformer Engine 2.11; the arithmetic is torch's. What its
kernels do on a GPU is for the tests marked `gpu`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


class PreciseAdam(torch.optim.Optimizer):
    """AdamW on bfloat16 parameters. The state of each: exp_avg, exp_avg_sq and master_param.

    master_param is int16 [n]: the lower half of the float32 parameter, whose upper half, rounded, is the parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        assert adam_w_mode and master_weights and use_decoupled_grad and store_param_remainders
        assert master_weight_dtype is torch.float32
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype, "master_param": torch.int16}

    def initialize_state(self, param: Tensor, store_param_remainders: bool) -> None:
        assert store_param_remainders
        zeros = {name: torch.zeros_like(param, dtype=dtype) for name, dtype in self._dtypes.items()}
        self.state[param].update(zeros)

    def get_unscaled_state(self, param: Tensor, state_name: str) -> Tensor:
        state = self.state[param][state_name]
        return state.float() if state.dtype is torch.bfloat16 else state

    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        assert unscaled_state.dtype is (torch.int16 if state_name == "master_param" else torch.float32)
        self.state[param][state_name].copy_(unscaled_state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # which gives states the parameter's dtype
        params = [param for group in self.param_groups for param in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            if number in state_dict["state"]:
                given = state_dict["state"][number]
                self.state[param] = {name: given[name].to(dtype) for name, dtype in self._dtypes.items()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if param.decoupled_grad is not None:
                    self._step(group, param, self.state[param])

    def _step(self, group: dict[str, Any], param: Tensor, state: dict[str, Tensor]) -> None:
        assert param.dtype is torch.bfloat16
        if not state:
            self.initialize_state(param, True)
        grad: Tensor = param.decoupled_grad  # type: ignore[attr-defined]
        beta1, beta2 = group["betas"]
        first = beta1 * state["exp_avg"].float() + (1 - beta1) * grad
        second = beta2 * state["exp_avg_sq"].float() + (1 - beta2) * grad * grad
        change = first / (1 - beta1 ** group["step"])
        change /= (second / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
        main = joined(param, state["master_param"])
        main -= group["lr"] * (change + group["weight_decay"] * main)
        halves = main.view(torch.int16).view(-1, 2)  # the lower one first
        state["master_param"].copy_(halves[:, 0])
        param.view(torch.int16).copy_(halves[:, 1] + (halves[:, 0] < 0))
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)


def joined(upper: Tensor, lower: Tensor) -> Tensor:
    """Puts float32 numbers together, [n], from bfloat16 ones and int16 lower halves."""
    return torch.stack([lower, upper.detach().view(torch.int16) - (lower < 0).short()], 1).view(torch.float32)[:, 0]


@contextmanager
def precise_adam() -> Iterator[None]:
    """Lets Megatron find a Transformer Engine, of which there is nothing but this Adam."""
    names = ["transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"]
    found = {name: ModuleType(name) for name in names}
    found[names[0]].__version__ = "2.11.0"  # type: ignore[attr-defined]
    found[names[2]].FusedAdam = PreciseAdam  # type: ignore[attr-defined]
    with ExitStack() as stack:
        stack.enter_context(patch.dict(sys.modules, found))
        for name in ("optimizer", "optimizer.distrib_optimizer"):
            stack.enter_context(patch.object(sys.modules[f"megatron.core.{name}"], "Adam", PreciseAdam))
        stack.enter_context(patch.object(sys.modules["megatron.core.utils"], "_te_version", None))
        yield
