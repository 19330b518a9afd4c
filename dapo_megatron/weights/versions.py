"""Versions of the weights in a folder: each is a Hugging Face checkpoint, whole or not there."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dapo_megatron import disk
from dapo_megatron.errors import ConfigError
from dapo_megatron.hf_folder import tensor_files
from dapo_megatron.weights.buckets import Named
from dapo_megatron.weights.shards import write_tensors
from dapo_megatron.weights.verify import Arrivals, TransferError
from dapo_megatron.weights.version_folders import unfinished

_VISIBLE_SECONDS = 90.0
"""How long another machine may not see a new folder: NFS remembers for up to a minute what was not there."""
_POLL_SECONDS = 0.2


def write_version(target: Path, weights: Iterable[Named], side_files: Callable[[Path], object]) -> None:
    """Write a version. It gets its name once all is on the disk.

    Args:
        target: is not there (`version_folders.version_folder`).
        weights: contiguous tensors on CPU; each entry is a shard.
        side_files: writes what else belongs to the checkpoint.

    Raises:
        OSError, SafetensorError: where it cannot be written. Then nothing of it is left.
    """
    part = unfinished(target)
    try:
        shutil.rmtree(part, ignore_errors=True)  # of a run that was cut short
        part.mkdir(parents=True)
        write_tensors(weights, part)
        side_files(part)
        disk.sync(*part.rglob("*"), part)
        part.rename(target)
        disk.sync(target.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def read_version(
    folder: Path,
    arrivals: Arrivals,
    sums: Mapping[str, int] | None,
    load: Callable[[Named], object],
) -> None:
    """Load a version, file by file; each tensor is compared with its checksum before that.

    Files are mapped: processes of one machine read them once.

    Args:
        sums: name -> checksum; None where these are not wanted.
        load: puts tensors where the engine has its own.

    Raises:
        TransferError: where a tensor is not what it has to be, or the files are not there.
    """
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not folder.exists():
        if time.monotonic() > deadline:
            raise TransferError(
                f"{folder} is not there on this machine, {_VISIBLE_SECONDS:g} s after the trainer has written it: "
                f"weights.folder must be a folder that all machines share, under one path"
            )
        time.sleep(_POLL_SECONDS)
    try:
        files = tensor_files(folder)
        for file in sorted(set(files.values())):
            with safe_open(file, framework="pt") as opened:
                # One by one: what the engine has made its own is let go of.
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    tensor: Tensor = opened.get_tensor(name)
                    load(arrivals.take([(name, tensor)], None if sums is None else [sums.get(name, 0)]))
    except (OSError, SafetensorError, ConfigError) as error:
        raise TransferError(f"cannot read {folder}: {error}") from error
