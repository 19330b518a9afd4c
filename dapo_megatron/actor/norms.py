"""L2 norms of the gradient, the weights and the update for each kind of parameter, over the whole model in any layout.

Ranks add up squares in float64. Every parameter counts once: not its copies on other tensor-parallel ranks, the tied
output layer of the last pipeline stage, or replicas. The result is the same on every rank, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from dapo_megatron.errors import DapoError

KINDS = {
    "norm": "norm",
    "embedding": "embedding",
    "attention": "attention",
    "mlp": "mlp",
    "output": "output_layer",
}
"""Kind -> what the names of its parameters hold. The first that fits counts: Transformer Engine keeps a layer's norm
inside the linear layer after it, as in `self_attention.linear_qkv.layer_norm_weight`."""

_PIECE = 2**18
"""Elements that are squared and summed in float32: few enough for seven digits, and for CPU caches."""


class ParameterNormError(DapoError, ValueError):
    """A parameter that belongs to no kind, or an update that cannot be measured."""


class _Share(NamedTuple):
    """What this rank adds for one group of an optimizer part."""

    part: Any
    group: int
    """Index among the part's param_groups."""
    params: list[Tensor]
    """Main parameters: what Adam steps, in float32."""
    kinds: Tensor
    """int64 [pieces]: index of each piece's kind."""


class ParameterNorms:
    """Measures one optimizer. Every method is collective over all ranks.

    Args:
        optimizer: Megatron's chained Adam, with decoupled weight decay and the state layout of FusedAdam.
        chunks: this rank's GPTModels.

    Raises:
        ParameterNormError: for a parameter whose name fits no kind.
    """

    sizes: dict[str, int]
    """Kind -> parameters of the whole model, padding included. Kinds that the model lacks are left out."""

    def __init__(self, optimizer: Any, chunks: Sequence[torch.nn.Module]) -> None:
        kinds: dict[Any, int] = {param: _kind(name) for chunk in chunks for name, param in chunk.named_parameters()}
        self._optimizer = optimizer
        self._device = next(iter(kinds)).device
        self._shares = [share for part in optimizer.chained_optimizers for share in _shares(part, kinds)]
        sizes = self._zeros(1)
        for share in self._shares:
            numels = [piece.numel() for piece in _pieces(share.params)]
            sizes[0].index_add_(0, share.kinds, torch.tensor(numels, dtype=sizes.dtype, device=sizes.device))
        dist.all_reduce(sizes)
        self.sizes = {kind: int(size) for kind, size in zip(KINDS, sizes[0].tolist(), strict=True) if size}

    @torch.no_grad()
    def gradients(self) -> dict[str, float]:
        """`grad_norm/KIND` of the gradients as they are: after `prepare_grads()`, and before clipping where that is
        what is asked for. A kind whose gradient is not finite shows, the others keep their norm.
        """
        sums = self._zeros(1)
        for share in self._shares:
            grads = _pieces([param.grad for param in share.params])
            sums[0].index_add_(0, share.kinds, _squares(grads))
        (norms,) = self._norms(sums)
        return {f"grad_norm/{kind}": norm for kind, norm in norms.items()}

    @torch.no_grad()
    def updates(self) -> dict[str, float]:
        """`weight_norm/KIND` of the weights as they are, and `update_ratio/KIND`: norm of the last update over that.

        The update is computed again from Adam's state, without rounding to float32 weights and without a copy of them:
        lr (u + decay w) / (1 - lr decay), with u from both moments and w the weights after the step.

        Raises:
            ParameterNormError: where lr x decay is 1 or more, which leaves nothing of the weights to tell it from.
        """
        for group in self._optimizer.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            if lr * decay >= 1:
                raise ParameterNormError(
                    f"lr({lr}) x weight_decay({decay}) = {lr * decay}: decay alone undoes the weights in one step; "
                    f"choose them so that the product is far below 1"
                )
        sums = self._zeros(2)
        for share in self._shares:
            weights = _pieces(share.params)
            sums[0].index_add_(0, share.kinds, _squares(weights))
            sums[1].index_add_(0, share.kinds, _update_squares(share, weights))
        weight_norms, update_norms = self._norms(sums)
        ratios = {kind: update_norms[kind] / norm if norm else math.nan for kind, norm in weight_norms.items()}
        return {f"weight_norm/{kind}": norm for kind, norm in weight_norms.items()} | {
            f"update_ratio/{kind}": ratio for kind, ratio in ratios.items()
        }

    def _zeros(self, rows: int) -> Tensor:
        """float64 [rows, kinds]."""
        return torch.zeros(rows, len(KINDS), dtype=torch.float64, device=self._device)

    def _norms(self, sums: Tensor) -> list[dict[str, float]]:
        """From this rank's sums of squares, one dict per row."""
        dist.all_reduce(sums)
        rows = [dict(zip(KINDS, row, strict=True)) for row in sums.sqrt().tolist()]
        return [{kind: row[kind] for kind in self.sizes} for row in rows]


def _kind(name: str) -> int:
    """Index of the kind of the parameter with this name."""
    for index, fragment in enumerate(KINDS.values()):
        if fragment in name:
            return index
    raise ParameterNormError(
        f"the parameter {name} belongs to no kind; its name should hold one of {', '.join(KINDS.values())}"
    )


def _shares(part: Any, kinds: dict[Any, int]) -> list[_Share]:
    """Of one optimizer part: the parameters that this rank counts, by parameter group. None on a rank without any."""
    # Each of these groups holds all parameters of the part: among replicas, the one around rank 0 counts. So sums go
    # over all ranks, whatever the parts' groups are, in one reduction.
    if 0 not in dist.get_process_group_ranks(part.get_grad_stats_parallel_group()):
        return []
    models = _model_parameters(part)
    shares = []
    for index, group in enumerate(part.param_groups):
        params = [
            param
            for param in group["params"]
            if param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param, part.tp_group)
        ]
        indices = [kinds[models.get(param, param)] for param in params for _ in _pieces([param])]
        if params:
            shares.append(_Share(part, index, params, torch.tensor(indices, device=params[0].device)))
    return shares


def _model_parameters(part: Any) -> dict[Any, Any]:
    """Main parameter -> parameter of the model that it is a slice, a float32 copy, or both of."""
    if part.is_stub_optimizer:
        return {}
    groups: list[tuple[Any, Any]] = []
    if isinstance(part, DistributedOptimizer):
        groups = [
            (part.shard_fp32_from_float16_groups, part.model_float16_groups),
            (part.shard_fp32_groups, part.model_fp32_groups),
        ]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        groups = [(part.fp32_from_float16_groups, part.float16_groups)]
    return {
        main: model
        for mains, models in groups
        for main_group, model_group in zip(mains, models, strict=True)
        for main, model in zip(main_group, model_group, strict=True)
    }


def _pieces(tensors: Sequence[Any]) -> list[Tensor]:
    """Flat views of at most _PIECE elements, in order."""
    pieces: list[Tensor] = []
    for tensor in tensors:
        flat = tensor.view(-1)
        pieces.extend([flat] if flat.numel() <= _PIECE else flat.split(_PIECE))
    return pieces


def _squares(pieces: Iterable[Tensor]) -> Tensor:
    """float64 [pieces]: squared norms. They are taken one after the other."""
    return torch.stack([torch.dot(piece, piece) for piece in pieces]).double()


def _update_squares(share: _Share, weights: list[Tensor]) -> Tensor:
    """float64 [pieces]: squared norms of the last update, from the pieces of the weights after it."""
    adam: Any = share.part.optimizer
    group = adam.param_groups[share.group]
    first = _pieces([adam.state[param]["exp_avg"] for param in share.params])
    second = _pieces([adam.state[param]["exp_avg_sq"] for param in share.params])
    beta1, beta2 = group["betas"]
    lr, decay, step = group["lr"], group["weight_decay"], group["step"]
    correction1, correction2 = (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
    # Scalars stay outside: the update is the change below times lr * scale / (1 - lr * decay).
    scale = math.sqrt(correction2) / correction1
    eps = group["eps"] * math.sqrt(correction2)

    def changes() -> Iterator[Tensor]:
        for weight, mean, square in zip(weights, first, second, strict=True):
            change = square.sqrt().add_(eps)
            torch.div(mean, change, out=change)
            yield change.add_(weight, alpha=decay / scale) if decay else change

    return _squares(changes()) * (lr * scale / (1 - lr * decay)) ** 2
