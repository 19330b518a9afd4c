"""Measures L2 norms of gradient, weights and update for each kind of parameter, over the whole model in any layout.

Squares are summed in float64. Every parameter counts once: not its copies on other tensor-parallel ranks, the tied
output layer of the last pipeline stage, or replicas. The result is the same on every rank, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

KINDS = {
    "norm": "norm",
    "embedding": "embedding",
    "attention": "attention",
    "mlp": "mlp",
    "output": "output_layer",
    "other": "",
}
"""Kind -> a part of the names of its parameters. The first that fits counts: Transformer Engine keeps a layer's norm
inside the linear layer after it, as in `self_attention.linear_qkv.layer_norm_weight`."""

_CHUNK = 2**26
"""Elements of parameters that are measured at once: what the update needs for them in float32, and no more, is
allocated. A larger parameter is measured whole."""

_foreach: Any = torch
"""torch's own `_foreach_*` functions: on CUDA, a launch takes many tensors."""


class _Chunk(NamedTuple):
    """Some of the parameters that this rank counts, all from one group of an optimizer part."""

    part: Any
    group: int
    """Index among the part's param_groups."""
    params: list[Any]
    """What Adam was given: main parameters, float32; bfloat16 ones, where it keeps the main ones itself."""
    kinds: Tensor
    """int64 [params]: indices into KINDS."""


class ParameterNorms:
    """Measures one optimizer. Every method is collective over all ranks.

    Args:
        optimizer: Megatron's chained Adam, with decoupled weight decay and the state layout of FusedAdam; moments are
            float32 or bfloat16, which has no scale.
        chunks: this rank's GPTModels.
    """

    def __init__(self, optimizer: Any, chunks: Sequence[torch.nn.Module]) -> None:
        named: list[tuple[str, Any]] = [pair for chunk in chunks for pair in chunk.named_parameters()]
        kinds = {param: next(i for i, part in enumerate(KINDS.values()) if part in name) for name, param in named}
        self._device = named[0][1].device
        self._chunks = [chunk for part in optimizer.chained_optimizers for chunk in _chunks(part, kinds)]
        present = self._zeros(1)[0]
        for chunk in self._chunks:
            present[chunk.kinds] = 1.0
        dist.all_reduce(present)
        self._kinds = [kind for kind, count in zip(KINDS, present.tolist(), strict=True) if count]

    @torch.no_grad()
    def gradients(self) -> dict[str, float]:
        """Return `grad_norm/KIND` of the gradients as they are: call it after `prepare_grads()` and before clipping.

        Where the gradient of one kind is not finite, the others keep their norm.
        """
        sums = self._zeros(1)
        for chunk in self._chunks:
            sums[0].index_add_(0, chunk.kinds, _squares([_gradient(param) for param in chunk.params]))
        return {f"grad_norm/{kind}": norm for kind, norm in self._norms(sums)[0].items()}

    @torch.no_grad()
    def updates(self) -> dict[str, float]:
        """Return `weight_norm/KIND` of the weights as they are, and `update_ratio/KIND`, the update's norm over it.

        The update is computed again from Adam's state, without rounding to float32 weights and without a copy of them:
        lr (u + decay w) / (1 - lr decay), with u from both moments and w the weights after the step. So lr x decay must
        be below 1, as `config.OptimizerConfig` demands. Moments in bfloat16 are taken as kept, within
        2^-8 of what the step had.
        """
        sums = self._zeros(2)
        for chunk in self._chunks:
            mains = [_main(chunk.part.optimizer.state[param], param) for param in chunk.params]
            sums[0].index_add_(0, chunk.kinds, _squares(mains))
            sums[1].index_add_(0, chunk.kinds, _update_squares(chunk, mains))
        weight_norms, update_norms = self._norms(sums)
        ratios = {kind: update_norms[kind] / norm if norm else math.nan for kind, norm in weight_norms.items()}
        return {f"weight_norm/{kind}": norm for kind, norm in weight_norms.items()} | {
            f"update_ratio/{kind}": ratio for kind, ratio in ratios.items()
        }

    def _zeros(self, rows: int) -> Tensor:
        """Return zeros, float64 [rows, kinds]."""
        return torch.zeros(rows, len(KINDS), dtype=torch.float64, device=self._device)

    def _norms(self, sums: Tensor) -> list[dict[str, float]]:
        """Add up the ranks' squares [rows, kinds] and return the norms of the kinds that the model has, row by row."""
        dist.all_reduce(sums)
        rows = [dict(zip(KINDS, row, strict=True)) for row in sums.sqrt().tolist()]
        return [{kind: row[kind] for kind in self._kinds} for row in rows]


def _chunks(part: Any, kinds: Mapping[Any, int]) -> Iterator[_Chunk]:
    """Split up the parameters of an optimizer part that this rank counts."""
    # Each of these groups holds all parameters of the part: among replicas, the one around rank 0 counts. So sums go
    # over all ranks, whatever the parts' groups are, in one reduction.
    if 0 not in dist.get_process_group_ranks(part.get_grad_stats_parallel_group()):
        return
    given = _given_to_adam(part, kinds)
    for index, group in enumerate(part.param_groups):
        counted = [
            param
            for param in group["params"]
            if param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param, part.tp_group)
        ]
        ends = accumulate(param.numel() for param in counted)
        for _, pairs in groupby(zip(counted, ends, strict=True), key=lambda pair: pair[1] // _CHUNK):
            params = [param for param, _ in pairs]
            own = torch.tensor([given[param] for param in params], device=params[0].device)
            yield _Chunk(part, index, params, own)


def _given_to_adam(part: Any, kinds: Mapping[Any, int]) -> dict[Any, int]:
    """Return kinds of what an optimizer part steps, from those of the model's parameters."""
    places = getattr(part, "model_param_group_index_map", None)
    if places is None:
        return {getattr(param, "main_param", param): kind for param, kind in kinds.items()}
    # The distributed optimizer steps slices, those of the parameters that are this rank's.
    return {part.param_groups[group]["params"][place]: kinds[param] for param, (group, place) in places.items()}


def _gradient(param: Any) -> Tensor:
    """Return the gradient as Adam reads it. torch wants it in the parameter's dtype, and would not take float32."""
    gradient = getattr(param, "decoupled_grad", None)
    return param.grad if gradient is None else gradient


def _main(state: Mapping[str, Tensor], param: Tensor) -> Tensor:
    """Return the float32 parameter that Adam stepped.

    Transformer Engine's precision-aware one keeps its lower 16 bits, signed. The bfloat16 parameter is the upper 16,
    rounded: one more where the lower ones are negative.
    """
    lower = state.get("master_param")
    if lower is None:
        return param
    upper = param.detach().view(torch.int16) - (lower < 0).to(torch.int16)
    bits = upper.to(torch.int32).bitwise_left_shift_(16).bitwise_or_(lower.to(torch.int32).bitwise_and_(0xFFFF))
    return bits.view(torch.float32)


def _squares(tensors: list[Any]) -> Tensor:
    """Return the squared norms, float64 [tensors]."""
    # Summed in float32, 1e8 squares are off by 1% on CPU.
    return torch.stack(_foreach._foreach_norm(tensors, 2, dtype=torch.float64)).square()


def _update_squares(chunk: _Chunk, mains: list[Tensor]) -> Tensor:
    """Return the squared norms of the last update of these float32 parameters, float64 [params]."""
    adam: Any = chunk.part.optimizer
    group = adam.param_groups[chunk.group]
    states = [adam.state[param] for param in chunk.params]
    beta1, beta2 = group["betas"]
    lr, decay, step = group["lr"], group["weight_decay"], group["step"]
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    # Scalars stay outside: the update is the change below times lr * scale / (1 - lr * decay).
    scale = math.sqrt(correction2) / correction1
    changes = _foreach._foreach_sqrt([state["exp_avg_sq"].float() for state in states])
    _foreach._foreach_add_(changes, group["eps"] * math.sqrt(correction2))
    _foreach._foreach_reciprocal_(changes)
    _foreach._foreach_mul_(changes, [state["exp_avg"] for state in states])
    if decay:
        _foreach._foreach_add_(changes, mains, alpha=decay / scale)
    return _squares(changes) * (lr * scale / (1 - lr * decay)) ** 2
