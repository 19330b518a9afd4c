"""Sends micro-batches through the pipeline by Megatron's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from dapo_megatron.actor.head import RowSelection
from dapo_megatron.actor.shard import LayoutError, Shard, make_shard
from dapo_megatron.actor.topology import Topology
from dapo_megatron.config import ParallelConfig
from dapo_megatron.types import MicroBatch


class Schedule:
    """Runs the chunks of one model.

    Args:
        modules: this rank's GPTModels, in the wrappers that they train in.
        heads: those of the chunks that have an output layer.
        config: Megatron's, of the model.
    """

    def __init__(
        self,
        modules: Sequence[Any],
        heads: Sequence[RowSelection],
        config: Any,
        groups: ProcessGroupCollection,
        topology: Topology,
        parallel: ParallelConfig,
    ) -> None:
        self._modules, self._heads, self._config = list(modules), heads, config
        self._groups, self._topology, self._parallel = groups, topology, parallel

    def run(self, batches: Sequence[MicroBatch], on_output: Callable[..., Any], *, forward_only: bool) -> list[Any]:
        """Send micro-batches forward and, unless `forward_only`, back. Collective.

        Args:
            on_output: (shard, logits_1RV) on the last stage: the loss as Megatron wants it; with `forward_only`, called
                with non_loss_data as well, anything.

        Returns:
            On the last stage, what `on_output` gave for each; elsewhere, nothing.

        Raises:
            LayoutError: where virtual stages want another number of micro-batches.
        """
        topology, parallel = self._topology, self._parallel
        if len(batches) % parallel.micro_batch_multiple:
            raise LayoutError(
                f"{len(batches)} micro-batches do not divide into rounds of pp({parallel.pp}), which virtual pipeline "
                f"stages, vpp({parallel.vpp}), want; add empty ones (pack's micro_batch_multiple)"
            )
        shards = [
            make_shard(
                batch,
                cp=topology.cp,
                cp_rank=topology.cp_rank,
                sequence_parallel_ranks=topology.tp if parallel.sequence_parallel else 1,
                device=topology.device,
            )
            for batch in batches
        ]
        groups: dict[str, Any] = {"pg_collection": self._groups}
        if topology.pp > 1:
            groups["p2p_communicator"] = P2PCommunicator(self._groups.pp, self._config)
        return get_forward_backward_func(parallel.pp, parallel.vpp if parallel.vpp > 1 else None)(
            forward_step_func=partial(self._forward, on_output),
            data_iterator=[iter(shards) for _ in self._modules],
            model=self._modules,
            num_microbatches=len(shards),
            seq_length=max(batch.slots for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            **groups,
        )

    def _forward(
        self, on_output: Callable[..., Any], iterator: Iterator[Shard], module: Any
    ) -> tuple[Tensor, Callable[..., Any]]:
        shard = next(iterator)
        for head in self._heads:
            head.rows_R = shard.rows_R
        # In bfloat16, logits stay so: their log-probs are computed in float32 chunk by chunk.
        options = {"fp32_output": False} if self._config.bf16 else {}
        output = module(shard.tokens_t[None], shard.positions_t[None], None, packed_seq_params=shard.packed, **options)
        return output, partial(on_output, shard)
