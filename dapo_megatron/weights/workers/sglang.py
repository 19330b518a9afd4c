"""Runs inside SGLang's scheduler processes, which hold the weights: they take part in the gloo transport."""

# SGLang is in an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.managers import scheduler
from sglang.srt.managers.io_struct import EndWeightUpdateReqOutput
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.model_executor import model_runner
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

from dapo_megatron.mkl import choose_functions
from dapo_megatron.weights.buckets import Named
from dapo_megatron.weights.group import join_group
from dapo_megatron.weights.inbox import FromGroup
from dapo_megatron.weights.verify import Arrivals, Has, Share, TransferError

_JOINED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""Modules whose rows are those of others, as `Arrivals.loaded` has it: only some of SGLang's models say so."""


@dataclass(frozen=True)
class _Transfer:
    source: FromGroup
    arrivals: Arrivals


class GlooWeightUpdater(WeightUpdater):
    """Receives tensors in Hugging Face layout from our group, and compares them with what was sent. SGLang's own groups
    wait half an hour for a sender, and meet at the address of the machine's name.

    What SGLang's requests have no fields for is JSON in two that it passes on as they are: `backend`, when a group is
    joined, and `load_format`, with a bucket.
    """

    def init_weights_update_group(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> tuple[bool, str]:
        """`backend`: {"timeout_seconds", "inventory"}, the limit on joining and on each bucket, and what every push
        brings (`verify.Inventory`).
        """
        more, rank = json.loads(backend), rank_offset + self.tp_rank
        try:
            group = join_group(master_address, master_port, rank, world_size, more["timeout_seconds"])
        except RuntimeError as error:
            return False, f"rank {rank} of {world_size} did not join the group: {error}"
        share = Share(self.tp_rank, self.get_model_runner().server_args.tp_size, self._has)
        self._model_update_group[group_name] = _Transfer(FromGroup(group), Arrivals(more["inventory"], share=share))
        return True, f"rank {rank} of {world_size} has joined the group"

    def begin_weight_update(self) -> None:
        super().begin_weight_update()
        for arrivals in self._arrivals:
            arrivals.begin()

    def receive_weights_from_distributed(self, *, group_name: str, load_format: str, **_: Any) -> Named:
        """`load_format`: {"tensors", "checksums"} of the bucket (`WeightReceiver.receive`)."""
        bucket, transfer = json.loads(load_format), self._model_update_group[group_name]
        flat = transfer.arrivals.allocate(bucket["tensors"])
        transfer.source.fetch(flat, transfer.arrivals.sizes(bucket["tensors"]), {})()
        return transfer.arrivals.unpack(flat, bucket["tensors"], bucket["checksums"])

    def compare_loaded(self) -> None:
        """Raises: TransferError, where not all has come, or the model has something else."""
        for arrivals in self._arrivals:
            arrivals.end()
            arrivals.loaded(*self._has())

    def _has(self) -> Has:
        return dict(self.get_model().named_parameters()), _JOINED

    @property
    def _arrivals(self) -> list[Arrivals]:
        """None in a model that drafts: it loads what the other one has received."""
        return [transfer.arrivals for transfer in self._model_update_group.values()]


class ComparingManager(SchedulerWeightUpdaterManager):
    """Passes requests on to the updater. A request has succeeded where it has in all processes that share the model:
    SGLang answers what the first one does.
    """

    def init_weights_update_group(self, recv_req: Any) -> Any:
        return self._of_all(super().init_weights_update_group(recv_req))

    def update_weights_from_distributed(self, recv_req: Any) -> Any:
        return self._of_all(super().update_weights_from_distributed(recv_req))

    def end_weight_update(self, recv_req: Any) -> Any:
        output = super().end_weight_update(recv_req)
        try:
            if output.success:
                self.tp_worker.model_runner.weight_updater.compare_loaded()
        except TransferError as error:
            output = EndWeightUpdateReqOutput(success=False, message=str(error))
        return self._of_all(output)

    def _of_all(self, output: Any) -> Any:
        outputs: list[Any] = [None] * dist.get_world_size(self.tp_cpu_group)
        dist.all_gather_object(outputs, (output.success, output.message), group=self.tp_cpu_group)
        if failures := [message for success, message in outputs if not success]:
            return type(output)(success=False, message="; ".join(dict.fromkeys(failures)))
        return output


def run_scheduler(server_args: Any, *arguments: Any) -> None:
    """Take the place of SGLang's `run_scheduler_process`."""
    model_runner.WeightUpdater = GlooWeightUpdater
    scheduler.SchedulerWeightUpdaterManager = ComparingManager
    # Responses end with the tokens that a request names, and with no others.
    ModelConfig._get_hf_eos_token_id = lambda self: set()
    if server_args.device == "cpu":
        from dapo_megatron.weights.workers.sglang_cpu import keep_sequences_apart

        choose_functions()
        keep_sequences_apart()
    scheduler.run_scheduler_process(server_args, *arguments)
