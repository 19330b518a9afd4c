"""The checkpoint of a run of this project: whether it is what its manifest says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO

from pydantic import ValidationError

from dapo_megatron.checkpoint.folder import (
    MANIFEST,
    BrokenCheckpointError,
    File,
    Manifest,
    UnreadableError,
    check_file,
    read_manifest,
    step_of,
)
from dapo_megatron.convert.dist_files import FORMAT, CheckpointError
from dapo_megatron.convert.progress import progress
from dapo_megatron.errors import DapoError

CHECKPOINTS = "checkpoints"
_STATE = "state.json"


def is_of_a_run(folder: Path) -> bool:
    """Return whether a folder is, or was, a checkpoint of a run: by what lies in it, or by its name and place."""
    if (folder / MANIFEST).is_file() and ((folder / FORMAT).is_file() or (folder / _STATE).is_file()):
        return True
    folder = folder.absolute()
    return step_of(folder) is not None and ((folder / _STATE).is_file() or folder.parent.name == CHECKPOINTS)


def manifest_of(folder: Path) -> Manifest:
    """Return what a checkpoint of a run is made of.

    Raises:
        CheckpointError: where the manifest is missing or none.
    """
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{MANIFEST} is missing, so nothing tells whether the checkpoint is whole")
    try:
        manifest = read_manifest(folder)
    except (BrokenCheckpointError, UnreadableError) as error:
        cause = error.__cause__
        said = cause.errors()[0]["msg"] if isinstance(cause, ValidationError) else cause
        raise CheckpointError(f"{MANIFEST} cannot be read, so nothing tells what belongs there: {said}") from error
    for name in manifest.files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{MANIFEST} names a file outside the folder, {name!r}")
    return manifest


def differences(folder: Path, files: dict[str, File], hashes: TextIO | None = None) -> dict[str, str]:
    """Compare files with their entries in the manifest.

    Args:
        hashes: where progress is shown while all files are read for their SHA-256; None compares sizes only.

    Returns:
        File -> what is wrong with it, as a sentence.
    """
    found: dict[str, str] = {}
    with progress(hashes or sys.stderr, f"reading {folder}", sum(file.bytes for file in files.values())) as advance:
        for name, file in files.items():
            if not (folder / name).is_file():
                found[name] = f"{name} is missing"
                continue
            try:
                check_file(folder, name, file, content=hashes is not None)
            except DapoError as error:
                found[name] = str(error).removeprefix(f"{folder}/")
            advance(file.bytes)
    return found


def refuse_damaged(folder: Path) -> None:
    """
    Raises:
        CheckpointError: where a checkpoint of a run is not what its manifest says, as far as sizes tell.
    """
    try:
        problems = [*differences(folder, manifest_of(folder).files).values()]
    except CheckpointError as error:
        problems = [str(error)]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{folder} is damaged: {'; '.join(problems[:3])}{more}; copy it again, or take another step"
        )
