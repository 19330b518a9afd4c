"""From Megatron's torch_dist format to a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from dapo_megatron.config import ParallelConfig
from dapo_megatron.convert.dist_files import CheckpointError, DistReader, peek_common
from dapo_megatron.convert.layout import Weight
from dapo_megatron.convert.mapping import DTYPES, Model
from dapo_megatron.convert.output import copy_side_files, side_files, unfinished
from dapo_megatron.convert.places import Place
from dapo_megatron.convert.progress import progress
from dapo_megatron.convert.side_config import declare_dtype, read_config
from dapo_megatron.convert.tensors_file import Spec, TensorsWriter, join_experts
from dapo_megatron.convert.to_megatron import JOINED
from dapo_megatron.errors import ConfigError

SHARD_BYTES = 5_000_000_000
"""Of a safetensors file, as most publishers have it."""
_MODEL = ("embedding.", "decoder.", "output_layer.")


class MegatronModel:
    """The model in a torch_dist checkpoint: its weights, whatever else lies there.

    Args:
        hf: the folder with Hugging Face's config.json.

    Raises:
        ConfigError: where it is no such checkpoint, is not whole, or is not of the model that config.json describes.
    """

    def __init__(self, folder: Path, hf: Path) -> None:
        self.reader = DistReader(folder)
        self.model = Model(read_config(hf), ParallelConfig())
        self._keys = {weight: self._key(weight) for weight in self.model.layout.weights}
        known = {key for key, _ in self._keys.values()}
        extra = sorted(key for key in self.reader.tensors if key.startswith(_MODEL) and key not in known)
        if extra:
            raise ConfigError(
                f"{folder} has {len(extra)} tensors that the model of {hf / 'config.json'} has no place for, such as "
                f"{', '.join(extra[:3])}"
            )
        self._check_shapes(folder, hf)

    def _key(self, weight: Weight) -> tuple[str, tuple[int, ...]]:
        """Under which key a weight lies, and at which place of its first axes.

        Layers may be together, or, in checkpoints of models whose layers differ, each under its own name.
        """
        if weight.key in self.reader.tensors:
            return weight.key, weight.place
        if weight.key_of_layer in self.reader.tensors:
            return weight.key_of_layer, weight.place[1:]
        raise CheckpointError(
            f"{self.reader.folder} lacks {weight.name} ({weight.key}); it has {len(self.reader.tensors)} tensors"
        )

    def _check_shapes(self, folder: Path, hf: Path) -> None:
        for weight, (key, place) in self._keys.items():
            size = tuple(self.reader.tensors[key].size)
            counts = weight.counts[len(weight.place) - len(place) :]
            own, wanted = size[len(counts) :], weight.shape
            is_vocabulary = weight.key.startswith(("embedding.", "output_layer."))
            if is_vocabulary and own and own[0] >= self.model.hf_config.vocab_size:  # padded in any way
                wanted = (own[0], *wanted[1:])
            if (size[: len(counts)], own) != (counts, wanted):
                whole = [*counts, *weight.shape]
                raise ConfigError(f"{folder}: {key} has shape {list(size)}, but {hf / 'config.json'} makes it {whole}")

    def dtype(self, weight: Weight) -> torch.dtype:
        """Return what a weight is kept as."""
        return self.reader.tensors[self._keys[weight][0]].properties.dtype

    def read(self, weight: Weight) -> dict[str, Tensor]:
        """Return a weight as Hugging Face's tensors."""
        return self.model.to_hf(weight, self.reader.read(*self._keys[weight]))

    @property
    def specs(self) -> dict[str, Spec]:
        """What Hugging Face's tensors are, in the order of the model."""
        shapes = self.model.hf_shapes
        return {
            name: Spec(self.dtype(weight), shapes[name])
            for weight in self.model.layout.weights
            for name in self.model.names(weight)
        }


def megatron_to_hf(place: Place, target: Path, dtype: str | None, hf: Path | None, file: TextIO) -> list[str]:
    """Convert.

    Args:
        dtype: of `mapping.DTYPES`; None keeps what each tensor has.
        hf: a folder with config.json, tokenizer and the like, for a checkpoint that brings none.
        file: where progress is shown.

    Returns:
        What there is to say about it, in sentences.

    Raises:
        ConfigError: where the input cannot be converted.
        DapoError: where the output cannot be written.
    """
    sides = side_folder(place, hf)
    source = MegatronModel(place.folder, sides)
    # Megatron loads no checkpoint without it, and a folder that lacks a file may lack others.
    joins_experts = peek_common(place.folder).get(JOINED) is True
    specs = source.specs
    if dtype:
        specs = {name: Spec(DTYPES[dtype], spec.shape) for name, spec in specs.items()}
    if strange := {spec.dtype for spec in specs.values()} - set(DTYPES.values()):
        raise ConfigError(f"{place.folder} has weights of {strange.pop()}; give --dtype: one of {', '.join(DTYPES)}")
    nbytes = sum(spec.nbytes for spec in specs.values())
    room = nbytes + 256 * len(specs) + sum((sides / relative).stat().st_size for relative in side_files(sides))
    with unfinished(target, room) as folder, progress(file, f"writing {target}", nbytes) as advance:
        copy_side_files(sides, folder)
        dtypes = {str(spec.dtype).removeprefix("torch.") for spec in specs.values()}
        if len(dtypes) == 1:
            declare_dtype(folder / "config.json", dtypes.pop())
        whole = join_experts(specs) if joins_experts else specs
        with TensorsWriter(folder, whole, SHARD_BYTES) as writer:
            for weight in source.model.layout.weights:
                for name, tensor in source.read(weight).items():
                    writer.write(name, tensor.to(specs[name].dtype))
                    advance(specs[name].nbytes)
    return []


def side_folder(place: Place, hf: Path | None) -> Path:
    """Return the folder with Hugging Face's config.json for a Megatron checkpoint.

    Raises:
        ConfigError: where there is none.
    """
    if hf and not hf.is_dir():
        raise ConfigError(f"--hf-files {hf} {'is a file; give a folder' if hf.exists() else 'does not exist'}")
    sides = hf or place.hf
    if sides is None:
        raise ConfigError(
            f"{place.folder} brings no hf/config.json, so the model's architecture and tokenizer are not known; give "
            "--hf-files DIR, the folder of the Hugging Face checkpoint that the model began from"
        )
    return sides
