"""From a Hugging Face checkpoint to Megatron's torch_dist format."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

import torch

from dapo_megatron.config import ParallelConfig
from dapo_megatron.convert.dist_writer import DistWriter
from dapo_megatron.convert.mapping import DTYPES, Model, written_dtypes
from dapo_megatron.convert.output import copy_side_files, side_files, unfinished
from dapo_megatron.convert.places import HF
from dapo_megatron.convert.progress import progress
from dapo_megatron.convert.side_config import declare_dtype, read_config
from dapo_megatron.convert.tensors_file import TensorsFolder
from dapo_megatron.errors import ConfigError
from dapo_megatron.hf_folder import lacks_safetensors

_COMMON = {"iteration": 0, "checkpoint_version": 3.0}
"""What Megatron-LM asks for; by the version, heads of queries, keys and values lie side by side in groups."""
JOINED = "hf_joins_experts"
"""In common.pt too: whether the Hugging Face files had one tensor for all experts of a layer."""


def hf_to_megatron(source: Path, target: Path, parallel: ParallelConfig, dtype: str | None, file: TextIO) -> list[str]:
    """Convert.

    Args:
        parallel: the mesh whose ranks would have written it. Any other mesh can load it.
        dtype: of `mapping.DTYPES`; None keeps what each tensor has.
        file: where progress is shown.

    Returns:
        What there is to say about it, in sentences.

    Raises:
        ConfigError: where the input cannot be converted.
        DapoError: where the output cannot be written.
    """
    model = Model(read_config(source), parallel)
    if problem := lacks_safetensors(source):
        raise ConfigError(f"{source} {problem}")
    tensors = TensorsFolder(source)
    spare = model.check(tensors.specs, str(source))
    said = [f"left out {', '.join(spare)}: the model has no such parameters of its own"] if spare else []
    if "lm_head.weight" in spare and not torch.equal(
        tensors.read("lm_head.weight"), tensors.read("model.embed_tokens.weight")
    ):
        raise ConfigError(
            f"{source}: config.json ties lm_head.weight to model.embed_tokens.weight, but the two differ; set "
            "tie_word_embeddings to false there, or remove the tensor"
        )
    dtypes = written_dtypes(model, tensors.specs, DTYPES[dtype] if dtype else None)
    weights = model.layout.weights
    nbytes = sum(torch.Size(weight.shape).numel() * dtypes[weight.key].itemsize for weight in weights)
    sides = sum((source / relative).stat().st_size for relative in side_files(source))
    # torch.save adds about a kilobyte to each chunk.
    room = nbytes + sides + 2048 * (sum(len(weight.chunks) for weight in weights) + len(model.layout.objects))
    with unfinished(target, room) as folder, progress(file, f"writing {target}", nbytes) as advance:
        (folder / HF).mkdir()
        copy_side_files(source, folder / HF)
        if dtype:
            declare_dtype(folder / HF / "config.json", dtype)
        with DistWriter(folder, {**_COMMON, **({JOINED: True} if tensors.joins_experts else {})}) as writer:
            for weight in weights:
                parts = [tensors.read(name).to(dtypes[weight.key]) for name in model.names(weight)]
                data = model.to_megatron(weight, parts)
                parts.clear()
                size, ones = (*weight.counts, *weight.shape), (1,) * len(weight.place)
                for chunk in weight.chunks:
                    cut = chunk.cut(data)
                    offset = (*weight.place, *chunk.begin)
                    writer.add(chunk.rank, weight.key, size, offset, cut.reshape(*ones, *cut.shape))
                    advance(cut.nbytes)
            for key, rank in model.layout.objects.items():
                writer.add_object(rank, key, None)
    return said
