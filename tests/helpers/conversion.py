"""Conversions in this process, and what real Megatron ranks make of their results."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor

from dapo_megatron.config import ParallelConfig
from tests.helpers.models import make_config

SIDES = {
    "generation_config.json": b'{"eos_token_id": [3, 4],\r\n "temperature": 0.6}',
    "chat_template.jinja": b"{{ messages }}\n",
    "tokenizer.model": bytes(range(256)),
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "modeling_own.py": b"raise SystemExit  # never run\n",
    "LICENSE": b"free",
}
"""Files that publishers lay beside the weights."""


def add_sides(folder: Path) -> Path:
    for name, data in SIDES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def to_megatron(source: Path, target: Path, dtype: str | None = None, **parallel: Any) -> list[str]:
    from dapo_megatron.convert.to_megatron import hf_to_megatron

    return hf_to_megatron(source, target, ParallelConfig(**parallel), dtype, io.StringIO())


def to_hf(source: Path, target: Path, dtype: str | None = None, hf: Path | None = None) -> list[str]:
    from dapo_megatron.convert.places import resolve
    from dapo_megatron.convert.to_hf import megatron_to_hf

    return megatron_to_hf(resolve(source), target, dtype, hf, io.StringIO())


def tensors(folder: Path) -> dict[str, Tensor]:
    """Reads a Hugging Face checkpoint with safetensors' own reader."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_tensors(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype is tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def build_ranks(path: Path, parallel: dict[str, Any], dtype: str) -> tuple[Any, list[Any]]:
    """Joins the process group and builds this rank's model. Returns the chunks and Hugging Face's weights for them."""
    from dapo_megatron.actor import topology
    from dapo_megatron.actor.model import build_chunks, transformer_config
    from dapo_megatron.hf_folder import read_hf_config
    from dapo_megatron.weights.hf import HfCheckpoint

    topology.initialize(ParallelConfig(**parallel))
    config = make_config(path, model={"dtype": dtype}, parallel=parallel)
    hf_config = read_hf_config(path)
    settings = transformer_config(hf_config, config.model, config.parallel, config.memory)
    return HfCheckpoint(path), build_chunks(hf_config, config.model, settings, topology.process_groups())


def sharded(chunks: list[Any]) -> dict[str, Any]:
    """As Megatron-LM has it: `model`, or with virtual stages `model0`, `model1`, ..."""
    if len(chunks) == 1:
        return {"model": chunks[0].sharded_state_dict()}
    return {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}


def save(state: dict[str, Any], folder: Path) -> None:
    """Called on ranks: Megatron's own, without the process that it leaves behind."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # It waits for a device before it writes, whether there is one or not.
    with patch("torch.cuda.synchronize"):
        dist_checkpointing.save(state, str(folder))
    if filesystem_async._results_queue is not None:
        filesystem_async._results_queue._manager.shutdown()  # pyright: ignore[reportAttributeAccessIssue]  # a proxy
        filesystem_async._results_queue = None


def save_by_megatron(path: Path, saved: Path, parallel: dict[str, Any], dtype: str) -> None:
    """Called on ranks: loads a Hugging Face checkpoint and has Megatron save it."""
    from dapo_megatron.actor import topology

    checkpoint, chunks = build_ranks(path, parallel, dtype)
    checkpoint.load(chunks)
    save({**sharded(chunks), "iteration": 7}, saved)
    topology.shutdown()


def load_by_megatron(path: Path, converted: Path, parallel: dict[str, Any], dtype: str) -> int:
    """Called on ranks: has Megatron load a converted checkpoint, and compares with Hugging Face's weights.

    Returns how many parameters this rank compared.
    """
    from megatron.core import dist_checkpointing

    from dapo_megatron.actor import topology

    checkpoint, chunks = build_ranks(path, parallel, dtype)
    checkpoint.load(chunks)
    want = [{name: param.clone() for name, param in chunk.named_parameters()} for chunk in chunks]
    with torch.no_grad():
        for chunk in chunks:
            for param in chunk.parameters():
                param.fill_(torch.nan)
    state: Any = dist_checkpointing.load(sharded(chunks), str(converted))
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state["model" if len(chunks) == 1 else f"model{number}"])
        for name, param in chunk.named_parameters():
            assert torch.equal(param, want[number][name]), name
    topology.shutdown()
    return sum(map(len, want))
