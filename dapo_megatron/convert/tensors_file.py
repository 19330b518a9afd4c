"""Reads and writes safetensors one tensor at a time, without mapping files into memory.

The format: 8 bytes with the length of a JSON header, the header, the data. safetensors' own writer wants all tensors
of a file at once, and its reader maps the file, whose pages then count as memory of the process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from dapo_megatron.convert.dist_files import CheckpointError
from dapo_megatron.convert.memory import read_exactly, write_exactly

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LONGEST_HEADER = 100_000_000
"""As in safetensors itself."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Spec:
    """What a tensor is, without its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorsFile:
    """A safetensors file.

    Raises:
        CheckpointError: where it is no such file, or shorter than its header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.specs: dict[str, Spec] = {}
        self._begins: dict[str, int] = {}
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                size = path.stat().st_size
                if not 0 < length <= min(size, _LONGEST_HEADER):
                    raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
                header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = 0
            for name, entry in header.items():
                begin, stop = entry["data_offsets"]
                spec = self.specs[name] = Spec(DTYPES[entry["dtype"]], tuple(entry["shape"]))
                if begin < 0 or stop - begin != spec.nbytes:
                    raise ValueError(f"{name} has {stop - begin:,} bytes, but its shape wants {spec.nbytes:,}")
                self._begins[name] = 8 + length + begin
                end = max(end, 8 + length + stop)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is no whole safetensors file: {error}") from error
        if size < end:
            raise CheckpointError(f"{path} is cut short: it has {size:,} bytes, and its header wants {end:,}")

    def read(self, name: str) -> Tensor:
        """Return a tensor, read from the file."""
        spec = self.specs[name]
        memory = torch.empty(spec.nbytes, dtype=torch.uint8)
        try:
            with self.path.open("rb") as file:
                file.seek(self._begins[name])
                read_exactly(file, memory)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: cannot read {name}: {error}") from error
        return memory.view(spec.dtype).reshape(spec.shape)


class TensorsFolder:
    """The tensors of a Hugging Face checkpoint.

    Raises:
        CheckpointError: where a file that the index names is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        weight_map = read_index(folder)
        names = sorted(set(weight_map.values())) if weight_map else _without_index(folder)
        self.files = {name: TensorsFile(folder / name) for name in names}
        self._places = weight_map or {name: file for file in names for name in self.files[file].specs}
        lost = sorted(name for name, file in self._places.items() if name not in self.files[file].specs)
        if lost:
            raise CheckpointError(
                f"{folder / INDEX} places {len(lost)} tensors in files that do not have them, such as {lost[0]} in "
                f"{self._places[lost[0]]}"
            )
        self.specs = {name: self.files[file].specs[name] for name, file in self._places.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor, read from its file."""
        return self.files[self._places[name]].read(name)


def read_index(folder: Path) -> dict[str, str]:
    """Return in which file each tensor lies, as the index says; empty where there is no index.

    Raises:
        CheckpointError: where the index cannot be read.
    """
    file = folder / INDEX
    if not file.is_file():
        return {}
    try:
        weight_map = json.loads(file.read_bytes())["weight_map"]
        if not all(Path(name).name == name for name in weight_map.values()):
            raise ValueError("it names a file outside the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is no index of a checkpoint: {error}") from error
    return weight_map


def _without_index(folder: Path) -> list[str]:
    # Beside model.safetensors, some publishers lay the same weights in another form.
    return [SINGLE] if (folder / SINGLE).is_file() else sorted(file.name for file in folder.glob("*.safetensors"))


class TensorsWriter:
    """Safetensors files that are being written, their tensors known beforehand and given in any order.

    Leave it without an error, and files and index are complete and on disk.
    """

    def __init__(self, folder: Path, specs: Mapping[str, Spec], limit: int) -> None:
        """
        Args:
            limit: bytes of a file, unless one tensor has more.
        """
        self._folder = folder
        shards = list(_shards(specs, limit))
        self._places: dict[str, tuple[str, int]] = {}
        self._missing = set(specs)
        for number, names in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._begin(file, {name: specs[name] for name in names})
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
                "weight_map": {name: file for name, (file, _) in sorted(self._places.items())},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _begin(self, file: str, specs: Mapping[str, Spec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        begins = {}
        # As safetensors does: wide numbers first, so that all lie at multiples of their width.
        for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
            begins[name] = at
            offsets = [at, at := at + spec.nbytes]
            header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (self._folder / file).open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            # Its length is right from the start; what is not written yet takes no room.
            opened.truncate(8 + len(text) + at)
        self._places |= {name: (file, 8 + len(text) + begin) for name, begin in begins.items()}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one of the tensors, which has the dtype and the shape that were announced."""
        file, begin = self._places[name]
        self._missing.remove(name)
        with (self._folder / file).open("r+b", buffering=0) as opened:
            opened.seek(begin)
            write_exactly(opened, tensor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            return
        assert not self._missing, f"not written: {self._missing}"
        for file in {file for file, _ in self._places.values()} | ({INDEX} if self._has_index else set()):
            with (self._folder / file).open("rb") as opened:
                os.fsync(opened.fileno())

    @property
    def _has_index(self) -> bool:
        return (self._folder / INDEX).is_file()


def _shards(specs: Mapping[str, Spec], limit: int) -> Iterable[list[str]]:
    shard: list[str] = []
    held = 0
    for name, spec in specs.items():
        if shard and held + spec.nbytes > limit:
            yield shard
            shard, held = [], 0
        shard.append(name)
        held += spec.nbytes
    if shard:
        yield shard
