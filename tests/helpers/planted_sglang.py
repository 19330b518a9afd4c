"""SGLang's workers with a fault, as the module that the engine's command line names (`weights.workers.sglang`).

The fault is what the file says that PLANTED_FAULT names: "kept" has one tensor stay as it was. There is a prefix cache,
which SGLang leaves out where responses do not depend on one another.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sglang.srt.arg_groups.overrides import declare_resolution  # pyright: ignore[reportMissingImports]

from dapo_megatron.weights.buckets import Named
from dapo_megatron.weights.workers import sglang

KEPT = "model.layers.1.mlp.up_proj.weight"

_load = sglang.GlooWeightUpdater.load_weights_from_distributed


def _keeping(self: Any, named_tensors: Named) -> tuple[bool, str]:
    kept = Path(os.environ["PLANTED_FAULT"]).read_text() == "kept"
    return _load(self, [(name, tensor) for name, tensor in named_tensors if not (kept and name == KEPT)])


def run_scheduler(server_args: Any, *arguments: Any) -> None:
    declare_resolution(server_args, __name__, disable_radix_cache=False)
    sglang.GlooWeightUpdater.load_weights_from_distributed = _keeping
    sglang.run_scheduler(server_args, *arguments)
