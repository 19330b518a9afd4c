"""The folder of a conversion: under its name only once it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dapo_megatron import disk
from dapo_megatron.errors import ConfigError, DapoError
from dapo_megatron.units import size

_MARGIN = 64 << 20
"""Bytes left free besides: files have sizes in blocks, and others write too."""
_WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".distcp"),
    *(".unfinished", ".lock"),
}

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def refuse_existing(target: Path) -> None:
    """
    Raises:
        ConfigError: where `target` is there.
    """
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} is there already; give another name, or remove it first")


@contextmanager
def unfinished(target: Path, nbytes: int) -> Iterator[Path]:
    """Yield a folder that becomes `target` on leaving; whatever ends it before, an interrupt too, leaves nothing.

    Args:
        nbytes: what will be written, for a look at the room there is.

    Raises:
        ConfigError: where `target` is there already, its folder cannot be written to, or the disk has no room.
        DapoError: where writing fails later.
    """
    refuse_existing(target)
    parent = target.absolute().parent
    there = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if (free := shutil.disk_usage(there).free) < nbytes + _MARGIN:
        raise ConfigError(
            f"{target} needs {size(nbytes)} and {size(_MARGIN)} to spare, but only {size(free)} are free in {there}; "
            "give an OUT on another disk, or free some"
        )
    folder = parent / f"{target.name}.unfinished-{os.getpid()}"
    made = [entry for entry in (parent, *parent.parents) if not entry.exists()]
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        _remove(folder, made)
        raise ConfigError(
            f"cannot make a folder in {there}: {error.strerror}; give an OUT in a folder that you may write to"
        ) from error
    try:
        yield folder
        disk.sync(folder)
        folder.rename(target)
        disk.sync(parent)
    except OSError as error:
        _remove(folder, made)
        raise DapoError(f"cannot write {target}: {error}; nothing is left of it") from error
    except BaseException:
        _remove(folder, made)
        raise


def warnings_about(sides: Path) -> list[str]:
    """Return what a checkpoint lacks beside its weights, and a model can be converted without, as sentences."""
    if any((sides / name).is_file() for name in _TOKENIZERS) or any(sides.glob("*.tiktoken")):
        return []
    return [f"warning: {sides} has no tokenizer ({', '.join(_TOKENIZERS)}), so the result has none"]


def _remove(folder: Path, made: list[Path]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for entry in made:
        try:
            entry.rmdir()
        except OSError:  # somebody else has put something there
            return


def side_files(folder: Path) -> list[Path]:
    """Return all files of a Hugging Face checkpoint that hold no weights, relative to it: tokenizer, template, code."""
    return [file.relative_to(folder) for file in sorted(folder.rglob("*")) if _is_side_file(file, folder)]


def _is_side_file(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(folder).parts)
    is_weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
    return file.is_file() and not hidden and not is_weights


def copy_side_files(source: Path, target: Path) -> None:
    """Copy them byte for byte."""
    for relative in side_files(source):
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target / relative)
        disk.sync(target / relative)
