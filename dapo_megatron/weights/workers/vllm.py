"""Runs inside vLLM's worker processes: naming `WorkerExtension` to vLLM registers our transports there, and on CPU
keeps sequences apart (`vllm_cpu`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform

from dapo_megatron.weights.buckets import Named
from dapo_megatron.weights.gloo import join_group
from dapo_megatron.weights.inbox import Inbox
from dapo_megatron.weights.verify import Arrivals
from dapo_megatron.weights.versions import read_version


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
    kept: bool


@dataclass
class DiskInit(WeightTransferInitInfo):
    inventory: dict[str, Any]


@dataclass
class DiskUpdate(WeightTransferUpdateInfo):
    """A whole push: a folder, and the checksums of all tensors in the inventory's order."""

    folder: str
    checksums: list[int] | None


class Transfer(WeightTransferEngine[Any, Any]):
    """Loads tensors in Hugging Face layout as vLLM loads a checkpoint, in whatever way they come."""

    _arrivals: Arrivals

    def start_weight_update(self) -> None:
        self._loading = False
        self._arrivals.begin()

    def _begin_loading(self) -> None:
        """Once something comes: vLLM warns of every layer that then gets nothing."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if self._loading:
            return
        if current_platform.is_cpu():
            from dapo_megatron.weights.workers.vllm_cpu import let_experts_be_packed

            self._put_back = let_experts_be_packed(self.model)
        initialize_layerwise_reload(self.model)
        self._loading = True

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        self._arrivals.end()
        if self._loading:
            finalize_layerwise_reload(self.model, self.model_config)
            if current_platform.is_cpu():
                self._put_back()
            self._refresh_tied_head()
            self._loading = False
        joined: Any = getattr(self.model, "packed_modules_mapping", {})
        self._arrivals.loaded(dict(self.model.named_parameters()), joined)

    def _load(self, bucket: Named) -> None:
        load: Any = self.model.load_weights
        load(bucket)

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
        raise NotImplementedError("weights are sent by the publishers of dapo_megatron.weights")

    def shutdown(self) -> None: ...


class GlooWeightTransfer(Transfer):
    """Receives tensors from a group (`weights.gloo`)."""

    init_info_cls = GlooInit
    update_info_cls = GlooUpdate

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        group = join_group(init_info.host, init_info.port, rank, init_info.world_size, init_info.timeout_seconds)
        self._arrivals = Arrivals(init_info.inventory)
        self._inbox: Inbox | None = Inbox(group, self._arrivals, self._load)

    def start_weight_update(self) -> None:
        assert self._inbox
        super().start_weight_update()
        self._inbox.begin()

    def receive_weights(self, update_info: GlooUpdate, *_: Any) -> None:
        assert self._inbox
        if not update_info.kept:
            self._begin_loading()
        self._inbox.receive(update_info.tensors, update_info.checksums, update_info.kept)

    def finish_weight_update(self) -> None:
        assert self._inbox
        self._inbox.finish()
        super().finish_weight_update()

    def shutdown(self) -> None:
        self._inbox = None


class DiskWeightTransfer(Transfer):
    """Reads tensors from a folder (`weights.disk`)."""

    init_info_cls = DiskInit
    update_info_cls = DiskUpdate

    def init_transfer_engine(self, init_info: DiskInit) -> None:
        self._arrivals = Arrivals(init_info.inventory)
        self._names: list[str] = init_info.inventory["names"]

    def receive_weights(self, update_info: DiskUpdate, *_: Any) -> None:
        self._begin_loading()
        sums = update_info.checksums
        by_name = None if sums is None else dict(zip(self._names, sums, strict=True))
        read_version(Path(update_info.folder), self._arrivals, by_name, self._load)


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransfer)
WeightTransferEngineFactory.register_engine("disk", DiskWeightTransfer)
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
