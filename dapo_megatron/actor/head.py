"""Computes the logits of chosen rows only: nobody reads those of prompts and padding, and the vocabulary is wide."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


class RowSelection:
    """Chooses rows between the last layer of a GPTModel and its output layer. Set `rows_R` before each forward pass.

    Under sequence parallel each tensor-parallel rank holds another part of the slots, and the output layer would gather
    them. Here that happens before the choice, and the output layer is told that its input is whole.
    """

    def __init__(self, model: GPTModel) -> None:
        layer = model.output_layer
        self.rows_R: Tensor | None = None
        """int64 [R]: the slots, among those of this context-parallel rank, whose logits are wanted."""
        self._gathers = layer.sequence_parallel
        self._tp_group = model.pg_collection.tp
        if self._gathers:
            layer.sequence_parallel = False
            # Sums the ranks' gradients, each of its own columns, while the weight's is still computed. Without it
            # Megatron sums them afterwards.
            layer.allreduce_dgrad = True
        layer.register_forward_pre_hook(self._select)

    def _select(self, layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_t1H, *rest = inputs
        assert self.rows_R is not None, "name the rows before the forward pass"
        if self._gathers:
            hidden_t1H = gather_from_sequence_parallel_region(
                hidden_t1H, tensor_parallel_output_grad=False, group=self._tp_group
            )
        return (hidden_t1H.index_select(0, self.rows_R), *rest)
