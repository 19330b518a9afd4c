"""Reads both forms of a model and compares them, tensor by tensor."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TextIO

from torch import Tensor

from dapo_megatron.convert.mapping import DTYPES
from dapo_megatron.convert.memory import bytes_of
from dapo_megatron.convert.progress import progress
from dapo_megatron.convert.tensors_file import TensorsFolder
from dapo_megatron.convert.to_hf import MegatronModel
from dapo_megatron.errors import DapoError


class VerifyError(DapoError):
    """The two forms differ."""


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    found.update(bytes_of(tensor))
    return found.hexdigest()


def compare_tensors(megatron: Path, sides: Path, hf: Path, dtype: str | None, file: TextIO) -> str:
    """Compare every tensor of a Hugging Face checkpoint with that of a Megatron checkpoint, by hash.

    Args:
        sides: the folder with the Megatron checkpoint's config.json.
        dtype: what the one that was read first was cast to; None where it was not.

    Returns:
        What was compared, as a sentence.

    Raises:
        VerifyError: naming the tensors that differ.
    """
    source, tensors = MegatronModel(megatron, sides), TensorsFolder(hf)
    spare = source.model.check(tensors.specs, str(hf))
    cast = DTYPES[dtype] if dtype else None
    differ = []
    with progress(file, "comparing", sum(spec.nbytes for spec in tensors.specs.values())) as advance:
        for weight in source.model.layout.weights:
            for name, tensor in source.read(weight).items():
                other = tensors.read(name)
                advance(other.nbytes)
                if digest(tensor.to(cast or tensor.dtype)) != digest(other.to(cast or other.dtype)):
                    differ.append(name)
    if differ:
        raise VerifyError(
            f"{len(differ)} of {len(tensors.specs) - len(spare)} tensors of {hf} differ from those of {megatron}, such "
            f"as {', '.join(differ[:3])}"
        )
    how = f"after casting to {dtype}, by SHA-256" if dtype else "by SHA-256"
    return f"all {len(tensors.specs) - len(spare)} tensors are equal {how}"
