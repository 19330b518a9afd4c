"""Writes Megatron's torch_dist format, tensor by tensor, as if each rank of a mesh had written its own file.

torch's FileSystemWriter makes the same files, but keeps the last tensor of every key until a file is done: 5 GB for
32B parameters. So the records are made here, of torch's own classes.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dapo_megatron import disk
from dapo_megatron.convert.dist_files import COMMON, FORMAT, METADATA


class DistWriter:
    """A checkpoint that is being written into a folder. Leave it without an error, and it is complete and on disk."""

    def __init__(self, folder: Path, common: dict[str, Any]) -> None:
        """
        Args:
            common: what `common.pt` is to hold.
        """
        self._folder, self._common = folder, common
        self._state: dict[str, Any] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._files: dict[int, Any] = {}
        self._open = ExitStack()

    def add(self, rank: int, key: str, size: tuple[int, ...], offset: tuple[int, ...], data: Tensor) -> None:
        """Write a chunk of a tensor.

        Args:
            size: of the whole tensor.
            offset: of the chunk in it. `size`, `offset` and `data` have the same number of axes.
        """
        # torch.save would write all of the memory that a view is a part of.
        if data.untyped_storage().nbytes() != data.nbytes or not data.is_contiguous():
            data = data.clone(memory_format=torch.contiguous_format)
        properties = TensorProperties(dtype=data.dtype)
        entry = self._state.setdefault(key, TensorStorageMetadata(properties, torch.Size(size), []))
        if entry.properties.dtype is not data.dtype:
            raise ValueError(f"{key}: a chunk of {data.dtype} among those of {entry.properties.dtype}")
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offset), data.shape))
        self._save(rank, MetadataIndex(key, offset), data)

    def add_object(self, rank: int, key: str, value: Any) -> None:
        """Write one of Megatron's ShardedObjects, under the key that has its place in the whole."""
        self._state[key] = BytesStorageMetadata()
        self._save(rank, MetadataIndex(key), [value])

    def _save(self, rank: int, index: MetadataIndex, value: Any) -> None:
        name = f"__{rank}_0.distcp"
        if rank not in self._files:
            self._files[rank] = self._open.enter_context((self._folder / name).open("wb"))
        file = self._files[rank]
        offset = file.tell()
        try:
            torch.save(value, file)
        except RuntimeError as error:  # torch's own, about its writer, in place of what the file said
            raise OSError(f"{name}: {str(error).splitlines()[0]}") from error
        self._places[index] = _StorageInfo(name, offset, file.tell() - offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            if error is not None:
                return
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        metadata = Metadata(self._state, storage_data=self._places, storage_meta=StorageMeta())
        metadata.version = CURRENT_DCP_VERSION
        disk.write(self._folder / METADATA, pickle.dumps(metadata))
        common = io.BytesIO()
        torch.save(self._common, common)
        disk.write(self._folder / COMMON, common.getvalue())
        backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
        versions = {f"{name}_version": 1 for name in backends}
        # The last file: a folder that has it is complete.
        disk.write(self._folder / FORMAT, json.dumps({**backends, **versions}).encode())
