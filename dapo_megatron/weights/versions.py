"""A folder of versions of the weights: each is a Hugging Face checkpoint, whole or not there."""

from __future__ import annotations

import re
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

_VISIBLE_SECONDS = 90.0
"""How long another machine may not see a new folder: NFS remembers for up to a minute what was not there."""
_POLL_SECONDS = 0.2
_VERSION = re.compile(r"version-\d+|\.version-\d+\.unfinished")


def version_folder(folder: Path, version: int) -> Path:
    return folder / f"version-{version}"


def write_version(folder: Path, version: int, weights: Iterable[Named], side_files: Callable[[Path], object]) -> Path:
    """Write a version, in the place of the same one that is there. It gets its name once all is on the disk.

    Args:
        weights: contiguous tensors on CPU; each entry is a shard.
        side_files: writes what else belongs to the checkpoint.

    Raises:
        OSError, SafetensorError: where it cannot be written. Then nothing of it is left.
    """
    target = version_folder(folder, version)
    unfinished = folder / f".{target.name}.unfinished"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was cut short
        unfinished.mkdir(parents=True)
        write_tensors(weights, unfinished)
        side_files(unfinished)
        disk.sync(*unfinished.rglob("*"), unfinished)
        if target.exists():
            shutil.rmtree(target)
        unfinished.rename(target)
        disk.sync(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return target


def remove_others(folder: Path, version: int) -> None:
    """Remove all versions but one, as far as that can be done, and nothing else that may be there."""
    for other in folder.iterdir():
        if _VERSION.fullmatch(other.name) and other != version_folder(folder, version):
            shutil.rmtree(other, ignore_errors=True)


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
