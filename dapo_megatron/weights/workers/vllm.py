"""Runs inside vLLM's worker processes: naming `WorkerExtension` to vLLM registers our transports there, and on CPU
keeps sequences apart (`vllm_cpu`) and has MKL ready, before there is a model.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform

from dapo_megatron.mkl import choose_functions
from dapo_megatron.weights.buckets import HOST, Named
from dapo_megatron.weights.group import Group, join_group
from dapo_megatron.weights.handles import open_own
from dapo_megatron.weights.inbox import FromGroup, FromRooms, Inbox, Source
from dapo_megatron.weights.verify import Arrivals, Has, Share
from dapo_megatron.weights.versions import read_version

log = logging.getLogger(__name__)


@dataclass
class GroupInit(WeightTransferInitInfo):
    host: str
    port: int
    rank_offset: int
    """Rank in the transfer group of this engine's first worker."""
    world_size: int
    timeout_seconds: float
    inventory: dict[str, Any]
    """`verify.Inventory`'s fields."""


@dataclass
class RoomsInit(WeightTransferInitInfo):
    rooms: list[list[dict[str, Any]]]
    """Of each rank, the handles of its rooms (`handles.Handle`'s fields)."""
    inventory: dict[str, Any]


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):
    """One bucket, as `WeightReceiver.receive` has it. Names, dtypes and shapes are known from the inventory."""

    tensors: list[int]
    checksums: list[int] | None
    kept: bool
    room: int | None = None
    starts: list[int] | None = None


@dataclass
class DiskInit(WeightTransferInitInfo):
    inventory: dict[str, Any]


@dataclass
class DiskUpdate(WeightTransferUpdateInfo):
    """A whole push: a folder, and the checksums of all tensors in the inventory's order."""

    folder: str
    checksums: list[int] | None


def told_when_asked(*, anew: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Have a method of `Transfer` keep its failure, instead of raising it, and do nothing after one.

    Where a worker raises, vLLM answers at once, and takes what other workers say of this call for their answers to the
    next one. So none of them does, and whoever called asks all of them (`WorkerExtension.push_failure`).

    Args:
        anew: whether failures before this call do not matter any more.
    """

    def decorate(method: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(method)
        def call(self: Transfer, *args: Any) -> None:
            if anew:
                self.failure = None
            if self.failure is not None:
                return
            try:
                method(self, *args)
            except Exception as error:  # told, whatever it is
                log.exception("in a push of weights")
                self.failure = f"{type(error).__name__}: {error}"

        return call

    return decorate


class Transfer(WeightTransferEngine[Any, Any]):
    """Loads tensors in Hugging Face layout as vLLM loads a checkpoint, in whatever way they come."""

    failure: str | None = None
    _arrivals: Arrivals

    @told_when_asked(anew=True)
    def start_weight_update(self) -> None:
        self._begin()

    def _begin(self) -> None:
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

    @told_when_asked()
    def finish_weight_update(self) -> None:
        self._finish()

    def _finish(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        self._arrivals.end()
        if self._loading:
            finalize_layerwise_reload(self.model, self.model_config)
            if current_platform.is_cpu():
                self._put_back()
            self._refresh_tied_head()
            self._loading = False
        self._arrivals.loaded(*self._has())

    def _share(self) -> Share:
        ranks = self.parallel_config.tensor_parallel_size
        return Share(self.parallel_config.rank % ranks, ranks, self._has)

    def _has(self) -> Has:
        joined: Any = getattr(self.model, "packed_modules_mapping", {})
        return dict(self.model.named_parameters()), joined

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


class BucketTransfer(Transfer):
    """Receives tensors in buckets, the next one of which comes while one is loaded."""

    update_info_cls = BucketUpdate

    _inbox: Inbox | None = None

    def _open(self, source: Source, inventory: dict[str, Any], device: torch.device) -> None:
        self._arrivals = Arrivals(inventory, device, self._share())
        self._inbox = Inbox(source, self._arrivals, self._load, self._has)

    def _begin(self) -> None:
        assert self._inbox
        super()._begin()
        self._inbox.begin()

    @told_when_asked()
    def receive_weights(self, update_info: BucketUpdate, *_: Any) -> None:
        assert self._inbox
        if not update_info.kept:
            self._begin_loading()
        place = {"room": update_info.room, "starts": update_info.starts}
        self._inbox.receive(update_info.tensors, update_info.checksums, update_info.kept, place)

    def _finish(self) -> None:
        assert self._inbox
        self._inbox.finish()
        super()._finish()

    def shutdown(self) -> None:
        self._inbox = None


class GroupWeightTransfer(BucketTransfer):
    """Receives tensors from a group (`weights.broadcast`)."""

    init_info_cls = GroupInit

    _group: Group | None = None

    @told_when_asked(anew=True)
    def init_transfer_engine(self, init_info: GroupInit) -> None:
        self.shutdown()
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        device = self._receiving_device()
        self._group = join_group(
            init_info.host, init_info.port, rank, init_info.world_size, init_info.timeout_seconds, device=device
        )
        self._open(FromGroup(self._group), init_info.inventory, device)

    def shutdown(self) -> None:
        super().shutdown()
        if self._group:
            self._group.abandon()
        self._group = None

    def _receiving_device(self) -> torch.device:
        return HOST


class NcclWeightTransfer(GroupWeightTransfer):
    """Receives them on the GPU."""

    def _receiving_device(self) -> torch.device:
        return self.device


class IpcWeightTransfer(BucketTransfer):
    """Copies tensors from the rank on the same GPU (`weights.ipc`)."""

    init_info_cls = RoomsInit

    @told_when_asked(anew=True)
    def init_transfer_engine(self, init_info: RoomsInit) -> None:
        source = FromRooms(open_own(init_info.rooms, self.device))
        self._open(source, init_info.inventory, self.device)


class DiskWeightTransfer(Transfer):
    """Reads tensors from a folder (`weights.disk`)."""

    init_info_cls = DiskInit
    update_info_cls = DiskUpdate

    @told_when_asked(anew=True)
    def init_transfer_engine(self, init_info: DiskInit) -> None:
        self._arrivals = Arrivals(init_info.inventory, share=self._share())
        self._names: list[str] = init_info.inventory["names"]

    @told_when_asked()
    def receive_weights(self, update_info: DiskUpdate, *_: Any) -> None:
        self._begin_loading()
        sums = update_info.checksums
        by_name = None if sums is None else dict(zip(self._names, sums, strict=True))
        read_version(Path(update_info.folder), self._arrivals, by_name, self._load)


# vLLM has transports of its own by some of these names, which verify nothing; its IPC wants pickles.
for transport, engine in {
    "gloo": GroupWeightTransfer,
    "nccl": NcclWeightTransfer,
    "ipc": IpcWeightTransfer,
    "disk": DiskWeightTransfer,
}.items():
    WeightTransferEngineFactory.register_engine(f"dapo-{transport}", engine)
if current_platform.is_cpu():
    from dapo_megatron.weights.workers.vllm_cpu import keep_rows_apart

    choose_functions()
    keep_rows_apart()


class WorkerExtension:
    """Becomes part of vLLM's worker. vLLM imports this module to find it, and that does what else there is to do."""

    def push_failure(self) -> str | None:
        """What went wrong since the last push began, in this process."""
        worker: Any = self
        return worker.weight_transfer_engine.failure

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
