"""vLLM's workers with a fault: `--worker-extension-cls tests.helpers.planted_worker.WorkerExtension`.

The fault is what the file says that PLANTED_FAULT names: "reused" has buckets arrive in two places by turns, "second"
has the second of several workers refuse them, and "forgets" has them not load the embedding.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_megatron.weights.buckets import Named
from dapo_megatron.weights.verify import Arrivals
from dapo_megatron.weights.workers.vllm import Transfer, WorkerExtension

__all__ = ["WorkerExtension"]

_rooms = [torch.empty(1 << 20, dtype=torch.uint8) for _ in range(2)]
_allocate, _load = Arrivals.allocate, Transfer._load


def _hurt(self: Arrivals, tensors: Sequence[int]) -> Tensor:
    fault = _fault()
    if fault == "second" and dist.get_rank() == 1:
        raise MemoryError("planted in the second worker")
    flat = _allocate(self, tensors)
    _rooms.reverse()
    return _rooms[0][: len(flat)] if fault == "reused" else flat


def _forgetful(self: Transfer, bucket: Named) -> None:
    forgets = _fault() == "forgets"
    _load(self, [(name, tensor) for name, tensor in bucket if not (forgets and "embed" in name)])


def _fault() -> str:
    return Path(os.environ["PLANTED_FAULT"]).read_text()


Arrivals.allocate = _hurt
Transfer._load = _forgetful
