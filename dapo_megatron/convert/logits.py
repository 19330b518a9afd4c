"""Compares the logits of a Megatron checkpoint with those of transformers' model, on a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dapo_megatron.config import MemoryConfig, ModelConfig, ParallelConfig
from dapo_megatron.convert.dist_files import check
from dapo_megatron.convert.side_config import read_config
from dapo_megatron.convert.verify import VerifyError
from dapo_megatron.units import size

TOLERANCE = 2e-5
"""Largest difference of a logit, in units of the largest logit or 1. Both sides compute in float32, in another order:
tiny models are within 5e-7, and 28 layers of 1536 columns were within 2.2e-6. Two tensors that are swapped gave 0.8."""
_TOKENS = 48
_ROOM = 1.2
"""Memory beside the parameters, as a factor, and in bytes:"""
_BASE = 2 << 30


def compare_logits(megatron: Path, hf: Path) -> str:
    """Load both into float32 models, one after the other, and compare their logits.

    Megatron's model is ours, filled by Megatron's dist_checkpointing.

    Args:
        hf: a whole Hugging Face checkpoint of the same model.

    Returns:
        What was seen, or that and why it was left out, as a sentence.

    Raises:
        VerifyError: where they differ by more than rounding.
    """
    import psutil

    hf_config = read_config(hf)
    parameters = _parameters(hf)
    wanted, free = int(parameters * 4 * _ROOM) + _BASE, psutil.virtual_memory().available
    if wanted > free:
        return (
            f"logits are not compared: in float32, {parameters:,} parameters x 4 bytes x {_ROOM} + {size(_BASE)} "
            f"= {size(wanted)}, but {size(free)} of memory are free"
        )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(hf_config.vocab_size, (_TOKENS,), generator=generator)
    tokens[:2] = torch.tensor([0, hf_config.vocab_size - 1])
    with torch.no_grad():
        got_LV, want_LV = _megatron_logits(megatron, hf_config, tokens), _hf_logits(hf, tokens)
    worst = float((got_LV - want_LV).abs().max() / want_LV.abs().max().clamp(min=1))
    if not worst <= TOLERANCE:
        raise VerifyError(
            f"logits of {megatron} differ from those of transformers' model by {worst:.2g} of the largest; "
            f"{TOLERANCE:.0e} are allowed for rounding"
        )
    return f"logits of {_TOKENS} tokens agree with transformers' within {worst:.1e} of the largest (float32)"


def _parameters(hf: Path) -> int:
    from dapo_megatron.convert.tensors_file import TensorsFolder

    return sum(torch.Size(spec.shape).numel() for spec in TensorsFolder(hf).specs.values())


def _megatron_logits(folder: Path, hf_config: Any, tokens: Tensor) -> Tensor:
    from dapo_megatron.actor import topology
    from dapo_megatron.actor.head import RowSelection
    from dapo_megatron.actor.model import build_chunks, transformer_config
    from dapo_megatron.actor.shard import make_shard
    from dapo_megatron.pack.microbatch import build
    from dapo_megatron.types import TrainSample

    check(folder)
    topo = topology.initialize(ParallelConfig())
    try:
        from megatron.core import dist_checkpointing

        model = ModelConfig.model_validate({"path": ".", "dtype": "float32", "layers": "torch"})
        config = transformer_config(hf_config, model, ParallelConfig(), MemoryConfig())
        (chunk,) = build_chunks(hf_config, model, config, topology.process_groups())
        # Megatron adds what common.pt holds at the top.
        state: Any = dist_checkpointing.load({"model": chunk.sharded_state_dict()}, str(folder))
        chunk.load_state_dict(state["model"])
        ones = torch.ones(len(tokens) + 1, dtype=torch.bool)
        ids = torch.cat([tokens, tokens[:1]]).to(torch.int32)  # the last is a label only
        sample = TrainSample(token_ids=ids, loss_mask=ones, rollout_logprobs=ones.float(), advantage=0.0, group=0)
        batch = build([sample], sequence_multiple=1, total_multiple=1)
        shard = make_shard(batch, cp=1, cp_rank=0, sequence_parallel_ranks=1, device=topo.device)
        RowSelection(chunk).rows_R = shard.rows_R
        logits = chunk(shard.tokens_t[None], shard.positions_t[None], None, packed_seq_params=shard.packed)
        return logits.reshape(len(tokens), -1)[:, : hf_config.vocab_size]
    finally:
        topology.shutdown()


def _hf_logits(folder: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return model(tokens[None]).logits[0]
