"""Reads Megatron's torch_dist checkpoints, those of torch.distributed.checkpoint, without trusting them.

The format: `.metadata` is a pickle that says which chunk of which tensor lies where; `__R_N.distcp` are what torch.save
wrote, end to end; `common.pt` is torch.save's too. Megatron loads `.metadata`, and objects that lie among the tensors,
by plain unpickling, which runs whatever code a file asks for. Here `.metadata` may name only the classes of
`_ALLOWED`, chunks and objects are read with torch.load's weights_only, and `common.pt` is looked at without building
any of its classes. `check` does all this for a folder that Megatron is to load.

torch.save keeps a checksum (CRC-32) of each tensor, which torch.load does not look at. `DistReader` does.
"""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from dapo_megatron.convert.memory import bytes_of, read_exactly
from dapo_megatron.errors import ConfigError

METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"

_CHECKPOINT = "torch.distributed.checkpoint"
_ALLOWED = {
    *(f"{_CHECKPOINT}.metadata.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *(f"{_CHECKPOINT}.metadata.{name}" for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
    *(f"{_CHECKPOINT}.metadata.{name}" for name in ("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")),
    *(f"{_CHECKPOINT}.filesystem.{name}" for name in ("_StorageInfo", "_StoragePrefix")),
    # Plans of earlier saves, which Megatron keeps where it caches the structure of checkpoints.
    *(f"{_CHECKPOINT}.planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    f"{_CHECKPOINT}.planner.BytesIOWriteData",
    *("torch.Size", "torch.serialization._get_layout", "collections.OrderedDict"),
    *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    *(f"pathlib.{name}" for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(f"pathlib._local.{name}" for name in ("PosixPath", "PurePosixPath")),
}
"""What `.metadata` is made of: records of names, sizes and places, none of which does anything when it is built."""


class CheckpointError(ConfigError):
    """A checkpoint is damaged, incomplete or not what it should be. The message names the file."""


class UnreadableFileError(CheckpointError):
    """A checkpoint may be whole, and a file of it cannot be read here."""


class _ForeignClassError(Exception):
    """A pickle asks for a class that is none of `_ALLOWED`."""


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if f"{module}.{name}" not in _ALLOWED:
            raise _ForeignClassError(f"it asks for {module}.{name}, which has no place in one")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """Return what `.metadata` says, without running anything that it could smuggle in.

    Raises:
        CheckpointError: where it is missing, damaged, or names a class that does not belong there.
    """
    file = folder / METADATA
    try:
        with file.open("rb") as opened:
            metadata = _Metadata(opened).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError("it is no index of a checkpoint")
        _refuse_garbled(metadata)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; the checkpoint is incomplete") from error
    except OSError as error:
        raise UnreadableFileError(f"{file} cannot be read: {error.strerror}") from error
    except _ForeignClassError as error:
        raise CheckpointError(f"{file} is not read: {error}") from error
    except Exception as error:  # a damaged pickle raises whatever its opcodes stumble over
        raise CheckpointError(f"{file} is damaged and cannot be read ({error or type(error).__name__})") from error
    return metadata


def _refuse_garbled(metadata: Metadata) -> None:
    """Raise, of whatever kind, where a record lacks a part or has one of another type: a flipped bit does that."""
    for key, value in metadata.state_dict_metadata.items():
        if not isinstance(key, str) or not isinstance(value, TensorStorageMetadata | BytesStorageMetadata):
            raise pickle.UnpicklingError(f"its entry {key!r} is no tensor and no object")
        if isinstance(value, BytesStorageMetadata):
            continue
        sizes = [value.size, *(chunk.sizes for chunk in value.chunks)]
        is_whole = isinstance(value.properties.dtype, torch.dtype) and all(isinstance(s, torch.Size) for s in sizes)
        if not is_whole or not all(isinstance(chunk.offsets, tuple) for chunk in value.chunks):
            raise pickle.UnpicklingError(f"its entry {key!r} has no sizes")
    for index, place in metadata.storage_data.items():
        is_whole = isinstance(index.fqn, str) and isinstance(place.relative_path, str)
        if not is_whole or not isinstance(place.offset + place.length, int):
            raise pickle.UnpicklingError(f"its entry {index!r} has no place")


class _Inert:
    """Stands for an object of any class, and keeps what it was made of as `parts`."""

    def __init__(self, *parts: Any, **named: Any) -> None:
        self.parts: tuple[Any, ...] = (*parts, named) if named else parts

    def __setstate__(self, state: Any) -> None:
        self.parts = (*getattr(self, "parts", ()), state)

    def append(self, item: Any) -> None:
        self.parts = (*self.parts, item)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.parts = (*self.parts, (key, value))


class _Common(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        return _Inert

    def persistent_load(self, pid: Any, /) -> Any:
        return None  # the memory of a tensor


def peek_common(folder: Path) -> dict[str, Any]:
    """Return what `common.pt` holds, with plain values as they are and anything else as a lifeless stand-in.

    Raises:
        CheckpointError: where it is missing or damaged.
    """
    file = folder / COMMON
    try:
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            held = _Common(io.BytesIO(archive.read(name))).load()
        if not isinstance(held, dict):
            raise pickle.UnpicklingError("it holds no dict")
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; the checkpoint is incomplete") from error
    except OSError as error:
        raise UnreadableFileError(f"{file} cannot be read: {error.strerror}") from error
    except Exception as error:  # as above
        raise CheckpointError(f"{file} is damaged and cannot be read ({error or type(error).__name__})") from error
    return held


class DistReader:
    """The tensors of a torch_dist checkpoint.

    Raises:
        CheckpointError: where `.metadata` cannot be read, or a file that it names is missing or too short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metadata = read_metadata(folder)
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self.objects: set[str] = set()
        for key, value in self.metadata.state_dict_metadata.items():
            if isinstance(value, TensorStorageMetadata):
                self.tensors[key] = value
            else:
                self.objects.add(key)
        self._places: dict[MetadataIndex, Any] = self.metadata.storage_data
        self._chunks_at: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]] | None] = {}
        if problems := self.problems():
            raise CheckpointError(f"{folder}: {'; '.join(problems[:3])}")

    def problems(self) -> list[str]:
        """Return what can be seen to be missing without reading data, as sentences."""
        return file_problems(self.folder, self.metadata)

    def read(self, key: str, place: tuple[int, ...] = ()) -> Tensor:
        """Return a tensor whole, or its entry at `place` along the first axes, put together from its chunks.

        Raises:
            CheckpointError: where a chunk is damaged or does not exist.
        """
        described = self.tensors[key]
        size = [*(1 for _ in place), *described.size[len(place) :]]
        begin = [*place, *(0 for _ in size[len(place) :])]
        whole: Tensor | None = None
        found = 0
        for chunk in self._chunks_near(key, place):
            overlap = [
                (max(b, o), min(b + s, o + n))
                for b, s, o, n in zip(begin, size, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(start >= end for start, end in overlap):
                continue
            data = self._chunk(key, chunk.offsets, chunk.sizes, described.properties.dtype)
            for axis, (start, end) in enumerate(overlap):
                data = data.narrow(axis, start - chunk.offsets[axis], end - start)
            found += data.numel()
            if list(data.shape) == size:
                whole = data
                break
            whole = torch.empty(size, dtype=data.dtype) if whole is None else whole
            target = whole
            for axis, (start, end) in enumerate(overlap):
                target = target.narrow(axis, start - begin[axis], end - start)
            target.copy_(data)
        if whole is None or found != whole.numel():
            raise CheckpointError(
                f"{self.folder}: the chunks of {key} hold {found} of the {torch.Size(size).numel()} numbers wanted"
            )
        return whole[(0,) * len(place)]

    def _chunks_near(self, key: str, place: tuple[int, ...]) -> Sequence[ChunkStorageMetadata]:
        """The chunks that may hold what is at a place: of a model with many experts, a key has thousands."""
        ahead = len(place)
        if (key, ahead) not in self._chunks_at:
            found: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
            for chunk in self.tensors[key].chunks:
                found.setdefault(tuple(chunk.offsets[:ahead]), []).append(chunk)
            is_one = all(size == 1 for chunk in self.tensors[key].chunks for size in chunk.sizes[:ahead])
            self._chunks_at[key, ahead] = found if is_one else None
        near = self._chunks_at[key, ahead]
        return self.tensors[key].chunks if near is None else near.get(place, ())

    def read_object(self, key: str) -> Any:
        """Return an object that lies among the tensors; torch.load allows tensors and plain values.

        Raises:
            CheckpointError: where it is damaged, or is anything else.
        """
        place = self._places[MetadataIndex(key)]
        file = self.folder / place.relative_path
        with file.open("rb") as opened:
            opened.seek(place.offset)
            data = io.BytesIO(opened.read(place.length))
        with _named(file, key):
            return torch.load(data, map_location="cpu", weights_only=True)

    def _chunk(self, key: str, offsets: torch.Size, sizes: torch.Size, dtype: torch.dtype) -> Tensor:
        place = self._places.get(MetadataIndex(key, offsets))
        if place is None:
            raise CheckpointError(f"{self.folder / METADATA} has no place for the chunk of {key} at {list(offsets)}")
        file = self.folder / place.relative_path
        with _named(file, key), file.open("rb") as opened:
            tensor = _read_saved(_Part(opened, place.offset, place.length))
            if tensor.shape != sizes or tensor.dtype is not dtype:
                raise ValueError(
                    f"it holds {tensor.dtype} {list(tensor.shape)} where {METADATA} says {dtype} {list(sizes)}"
                )
        return tensor


def file_problems(folder: Path, metadata: Metadata) -> list[str]:
    """Return which files of a checkpoint are missing or shorter than `.metadata` says, as sentences."""
    ends: dict[str, int] = {}
    found = []
    placed = {index.fqn for index in metadata.storage_data}
    found += [f"{key} has no data" for key in metadata.state_dict_metadata if key not in placed]
    for place in metadata.storage_data.values():
        if Path(place.relative_path).name != place.relative_path:
            return [f"{METADATA} names a file outside the folder, {place.relative_path!r}"]
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        file = folder / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif (size := file.stat().st_size) < end:
            found.append(f"{name} is cut short: it has {size:,} bytes, and {METADATA} places data up to {end:,}")
    return found


def check(folder: Path) -> DistReader:
    """Look at all that loading by Megatron would unpickle, so that it is safe to have it loaded.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    reader = DistReader(folder)
    for key in sorted(reader.objects):
        reader.read_object(key)
    return reader


@contextmanager
def _named(file: Path, key: str) -> Iterator[None]:
    """Have what is raised name file and tensor."""
    try:
        yield
    except OSError as error:
        raise UnreadableFileError(f"{file}: cannot read {key}: {error}") from error
    except Exception as error:  # torch.load and zipfile raise many kinds on damaged data
        raise CheckpointError(f"{file}: {key} is damaged: {str(error).splitlines()[0]}") from error


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: Any, offset: int, length: int) -> None:
        self.file, self._offset, self._length = file, offset, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)[: max(self._length - self._at, 0)]
        self.file.seek(self._offset + self._at)
        count = self.file.readinto(view)
        self._at += count
        return count


def _read_saved(part: Any) -> Tensor:
    """Return the tensor that torch.save wrote, its memory read once, straight to where it stays.

    Raises:
        ValueError: where the memory does not have the checksum that was saved with it.
    """
    form = torch.load(part, map_location="meta", weights_only=True)
    if not isinstance(form, Tensor):
        raise ValueError(f"it is a {type(form).__name__}, not a tensor")
    with zipfile.ZipFile(part) as archive:
        record = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
    # Between the place that the directory names and the data lie 30 bytes, the name, and what pads to an alignment.
    part.seek(record.header_offset + 26)
    name, extra = (int.from_bytes(_exactly(part, 2), "little") for _ in range(2))
    part.seek(record.header_offset + 30 + name + extra)
    memory = torch.empty(record.file_size, dtype=torch.uint8)
    if record.file_size != form.untyped_storage().nbytes() or record.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"its data has {record.file_size:,} bytes, not {form.untyped_storage().nbytes():,}")
    read_exactly(part, memory)
    if zlib.crc32(bytes_of(memory)) != record.CRC:
        raise ValueError("its bytes do not have the checksum that they were saved with")
    tensor = torch.empty(0, dtype=form.dtype)
    return tensor.set_(memory.untyped_storage(), form.storage_offset(), form.size(), form.stride())


def _exactly(part: Any, count: int) -> bytes:
    data = part.read(count)
    if data is None or len(data) != count:
        raise ValueError("it ends too early")
    return data
