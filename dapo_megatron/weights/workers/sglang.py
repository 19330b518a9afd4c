"""Runs inside SGLang's scheduler processes, which hold the weights: they take part in the gloo transport."""

# SGLang is in an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

import os
from typing import Any

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.managers.scheduler import run_scheduler_process
from sglang.srt.model_executor import model_runner
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

from dapo_megatron.weights.buckets import Named, allocate, unflatten
from dapo_megatron.weights.gloo import join_group, transmit

PUSH_SECONDS = "DAPO_MEGATRON_PUSH_SECONDS"
"""Environment variable: limit on joining the group, and on each bucket. SGLang's requests have no place for it."""


class GlooWeightUpdater(WeightUpdater):
    """Receives tensors in Hugging Face layout from our group. SGLang's own groups wait half an hour for a sender, and
    meet at the address of the machine's name.
    """

    def init_weights_update_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str = "gloo",
    ) -> tuple[bool, str]:
        rank, seconds = rank_offset + self.tp_rank, float(os.environ[PUSH_SECONDS])
        try:
            self._model_update_group[group_name] = join_group(master_address, master_port, rank, world_size, seconds)
        except RuntimeError as error:
            return False, f"rank {rank} of {world_size} did not join the group: {error}"
        return True, f"rank {rank} of {world_size} has joined the group"

    def _receive_bucketed_weights_from_distributed(
        self, *, names: list[str], dtypes: list[str], shapes: list[list[int]], group_name: str
    ) -> Named:
        flat = allocate(dtypes, shapes)
        transmit(self._model_update_group[group_name], flat).wait()
        return unflatten(flat, names, dtypes, shapes)


def run_scheduler(server_args: Any, *arguments: Any) -> None:
    """Take the place of SGLang's `run_scheduler_process`."""
    model_runner.WeightUpdater = GlooWeightUpdater
    # Responses end with the tokens that a request names, and with no others.
    ModelConfig._get_hf_eos_token_id = lambda self: set()
    if server_args.device == "cpu":
        from dapo_megatron.weights.workers.sglang_cpu import keep_sequences_apart

        keep_sequences_apart()
    run_scheduler_process(server_args, *arguments)
