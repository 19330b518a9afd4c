"""Computes causal attention over packed sequences with torch's SDPA, context parallel included.

Sequences of about the same length go through one padded SDPA call. With 128 sequences of up to 39 slots this takes two
thirds of the time of one call per sequence, and with eight of 128 to 512 slots about as long; one call with a
block-diagonal mask takes several times longer. Padding stands at the end, where a causal mask hides it from every real
slot.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional

from dapo_megatron.actor.cpu.packing import plan_of

_SHORT = 512


class PackedAttention(MegatronModule):
    """The `core_attention` of the layer spec, for packed (THD) input only."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group: dist.ProcessGroup = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend: query [t, heads, d], key and value [t, groups, d] -> [t, heads x d]."""
        plan = plan_of(packed_seq_params.cu_seqlens_q, self.cp_group.size(), self.cp_group.rank())
        if self.cp_group.size() > 1:
            key, value = _GatherRanks.apply(torch.stack((key, value), dim=1), self.cp_group).unbind(dim=1)
        query_sizes = [bucket.sequences * bucket.queries for bucket in plan.buckets]
        key_sizes = [bucket.sequences * bucket.keys for bucket in plan.buckets]
        queries = _place(query, plan.query_places_t, sum(query_sizes)).split(query_sizes)
        keys = _place(key, plan.key_places_T, sum(key_sizes)).split(key_sizes)
        values = _place(value, plan.key_places_T, sum(key_sizes)).split(key_sizes)
        outputs = []
        for bucket, q, k, v in zip(plan.buckets, queries, keys, values, strict=True):
            # torch's backward pass in bfloat16 takes longer than that in float32, up to several times, where sequences
            # are short.
            dtype = torch.float32 if bucket.keys <= _SHORT else q.dtype
            output = functional.scaled_dot_product_attention(
                *(x.to(dtype).unflatten(0, (bucket.sequences, -1)).transpose(1, 2) for x in (q, k, v)),
                attn_mask=bucket.mask,
                is_causal=bucket.mask is None,
                scale=self.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            outputs.append(output.transpose(1, 2).flatten(0, 1).to(q.dtype))
        output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        if output.shape[0] != query.shape[0] or len(outputs) > 1:
            output = output.index_select(0, plan.query_places_t)
        return output.flatten(1)


def _place(x: Tensor, places: Tensor, size: int) -> Tensor:
    return x.new_zeros(size, *x.shape[1:]).index_copy(0, places, x)


class _GatherRanks(torch.autograd.Function):
    """Concatenate along dimension 0 over a group; the gradient is summed and cut back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        out = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None
