"""Runs inside vLLM's worker processes: naming `WorkerExtension` to vLLM registers the gloo transport there, and on CPU
keeps sequences apart (`vllm_cpu`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform

from dapo_megatron.weights.gloo import BACKEND, join_group, transmit
from dapo_megatron.weights.verify import Arrivals


@dataclass
class GlooInit(WeightTransferInitInfo):
    host: str
    port: int
    rank_offset: int
    """Rank in the transfer group of this engine's first worker."""
    world_size: int
    timeout_seconds: float
    inventory: dict[str, Any]
    """`verify.Inventory`'s fields."""


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    """One bucket, as `WeightReceiver.receive` has it. Names, dtypes and shapes are known from the inventory."""

    tensors: list[int]
    checksums: list[int] | None


class GlooWeightTransfer(WeightTransferEngine[GlooInit, GlooUpdate]):
    """Receives tensors in Hugging Face layout and loads them as vLLM loads a checkpoint."""

    init_info_cls = GlooInit
    update_info_cls = GlooUpdate

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._group: Any = join_group(
            init_info.host, init_info.port, rank, init_info.world_size, init_info.timeout_seconds
        )
        self._arrivals = Arrivals(init_info.inventory)

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if current_platform.is_cpu():
            from dapo_megatron.weights.workers.vllm_cpu import let_experts_be_packed

            let_experts_be_packed(self.model)
        initialize_layerwise_reload(self.model)
        self._arrivals.begin()

    def receive_weights(self, update_info: GlooUpdate, *_: Any) -> None:
        flat = self._arrivals.allocate(update_info.tensors)
        transmit(self._group, flat).wait()
        load: Any = self.model.load_weights
        load(self._arrivals.unpack(flat, update_info.tensors, update_info.checksums))

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        self._arrivals.end()
        finalize_layerwise_reload(self.model, self.model_config)
        self._refresh_tied_head()
        joined: Any = getattr(self.model, "packed_modules_mapping", {})
        self._arrivals.loaded(dict(self.model.named_parameters()), joined)

    def _refresh_tied_head(self) -> None:
        """A tied output layer shares the embedding's tensor, so vLLM loads nothing into it. On CPU it multiplies by a
        packed copy of that tensor, which has to be made again.
        """
        head: Any = getattr(self.model, "lm_head", None)
        if self.model_config.hf_text_config.tie_word_embeddings and hasattr(head, "quant_method"):
            head.quant_method.process_weights_after_loading(head)

    @staticmethod
    def trainer_send_weights(*_: Any) -> None:
        """Abstract in vLLM 0.25, where a class without it cannot be used."""
        raise NotImplementedError("weights are sent by dapo_megatron.weights.gloo.GlooPublisher")

    def shutdown(self) -> None:
        self._group = None


WeightTransferEngineFactory.register_engine(BACKEND, GlooWeightTransfer)
if current_platform.is_cpu():
    from dapo_megatron.weights.workers.vllm_cpu import keep_rows_apart

    keep_rows_apart()


class WorkerExtension:
    """Becomes part of vLLM's worker. vLLM imports this module to find it, and that does what else there is to do."""

    def abandon_update(self) -> None:
        """Be ready for another push after one that nobody goes on with, if there is such a one.

        What it has brought stays in layers that were complete; what others hold then does not matter, as all is sent.
        Until now the others have no memory: an engine that would be asked for a token would die.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        worker: Any = self
        with set_current_vllm_config(worker.vllm_config):
            finalize_layerwise_reload(worker.get_model(), worker.model_config)
        worker._weight_update_active = False
