"""Reads and writes safetensors one tensor at a time, without mapping files into memory.

The format: 8 bytes with the length of a JSON header, the header, the data. safetensors' own writer wants all tensors
of a file at once, and its reader maps the file, whose pages then count as memory of the process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from dapo_megatron import disk
from dapo_megatron.convert.dist_files import CheckpointError
from dapo_megatron.convert.memory import read_exactly, write_exactly
from dapo_megatron.hf_folder import expert_parts

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LONGEST_HEADER = 100_000_000
"""As in safetensors itself."""
_OF_EXPERT = re.compile(r"(?P<experts>.+\.mlp\.experts)\.\d+\.(?P<what>gate|up|down)_proj\.weight")

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


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor in a file: one of its own, or rows of one that joins all experts."""

    whole: str
    begin: int
    """Bytes into `whole`."""
    spec: Spec


def _parts_of(name: str, spec: Spec) -> dict[str, _Part]:
    rows, columns = spec.shape[-2:] if len(spec.shape) > 1 else (1, 1)
    return {
        part: _Part(
            name,
            (at.expert * rows + at.begin) * columns * spec.dtype.itemsize,
            Spec(spec.dtype, (at.end - at.begin, columns)),
        )
        for part, at in expert_parts(name, spec.shape).items()
    } or {name: _Part(name, 0, spec)}


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

    def read(self, name: str, part: _Part | None = None) -> Tensor:
        """Return a tensor or a part of it, read from the file."""
        part = part or _Part(name, 0, self.specs[name])
        memory = torch.empty(part.spec.nbytes, dtype=torch.uint8)
        try:
            with self.path.open("rb") as file:
                file.seek(self._begins[name] + part.begin)
                read_exactly(file, memory)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: cannot read {name}: {error}") from error
        return memory.view(part.spec.dtype).reshape(part.spec.shape)


class TensorsFolder:
    """The tensors of a Hugging Face checkpoint; one that joins all experts of a layer counts as those of each.

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
        whole = {name: self.files[file].specs[name] for name, file in self._places.items()}
        self._parts = {part: place for name, spec in whole.items() for part, place in _parts_of(name, spec).items()}
        self.specs = {name: part.spec for name, part in self._parts.items()}

    @property
    def joins_experts(self) -> bool:
        """Whether a tensor of the files joins all experts of a layer."""
        return len(self._parts) > len(self._places)

    def read(self, name: str) -> Tensor:
        """Return a tensor, read from its file."""
        part = self._parts[name]
        return self.files[self._places[part.whole]].read(part.whole, part)


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

    Of one that joins all experts of a layer, those of each are given.

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
        self._parts = {part: place for name, spec in specs.items() for part, place in _parts_of(name, spec).items()}
        self._missing = set(self._parts)
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
        part = self._parts[name]
        file, begin = self._places[part.whole]
        self._missing.remove(name)
        with (self._folder / file).open("r+b", buffering=0) as opened:
            opened.seek(begin + part.begin)
            write_exactly(opened, tensor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            return
        assert not self._missing, f"not written: {self._missing}"
        names = {file for file, _ in self._places.values()} | ({INDEX} if self._has_index else set())
        disk.sync(*(self._folder / name for name in names))

    @property
    def _has_index(self) -> bool:
        return (self._folder / INDEX).is_file()


def join_experts(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """Return, in place of the tensors of each expert, those that join all of a layer."""
    joined: dict[str, Spec] = {}
    for name, spec in specs.items():
        if (found := _OF_EXPERT.fullmatch(name)) is None:
            joined[name] = spec
        elif found["what"] != "up":  # its rows come after those of gate
            what, times = ("gate_up", 2) if found["what"] == "gate" else ("down", 1)
            whole = f"{found['experts']}.{what}_proj"
            others = joined[whole].shape[0] if whole in joined else 0
            rows, columns = spec.shape
            joined[whole] = Spec(spec.dtype, (others + 1, times * rows, columns))
    return joined


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
