"""The folder `checkpoints` of a run: one folder a checkpoint, whole or not there, and a pointer to the latest.

    checkpoints/latest                     the text "step-40"
    checkpoints/best                       the text "step-20", with checkpoint.keep_best
    checkpoints/step-40/manifest.json      what is in it: step, layout, and each file's size and SHA-256
    checkpoints/.step-50.1c0f.unfinished/  being written, or left by a run that was killed meanwhile
    checkpoints/step-60.aside/             of a run that went on from an earlier one; not looked at any more

A checkpoint gets its name once every file of it is on the disk, and loses it before the first is deleted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import secrets
import shutil
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dapo_megatron import disk
from dapo_megatron.errors import DapoError

LATEST, BEST = "latest", "best"
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")
_BLOCK = 16 << 20
"""Bytes that are read and hashed at once: between two, a thread may wait for the interpreter while others compute."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class BrokenCheckpointError(DapoError):
    """A checkpoint that is not what its manifest says."""


class MissingError(BrokenCheckpointError):
    """A checkpoint of which a file is not there, as far as this machine sees."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} is missing")
        self.path = path


class UnreadableError(DapoError):
    """A checkpoint of which a machine cannot tell whether it is whole."""


@dataclass(frozen=True, slots=True)
class File:
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint is, and what is in it."""

    step: int
    """Rollout steps done; also the version of the weights."""
    world_size: int
    parallel: dict[str, Any]
    """The section `parallel` of the run that wrote it."""
    dtype: str
    written: str
    """When, in UTC: 2026-11-28T09:30:00+00:00."""
    dapo_megatron: str
    """The version that wrote it."""
    files: dict[str, File]
    """Path in the folder -> what it has to be."""


_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def step_of(folder: Path) -> int | None:
    """Return the step in the name of a complete checkpoint's folder, None for any other name."""
    return _step(folder.name)


def _step(name: str) -> int | None:
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def unfinished(root: Path, step: int, life: str) -> Path:
    """Return the folder to write the checkpoint of `step` to.

    Args:
        life: a name of this life of the run. What a machine writes late that was part of another one goes elsewhere.
    """
    return root / f".step-{step}.{life}.unfinished"


def clear(root: Path) -> None:
    """Delete what a run left that was killed while it wrote or deleted a checkpoint."""
    for pattern in (".step-*.unfinished", ".step-*.deleted"):
        for folder in root.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def describe(path: Path) -> File:
    """Read a file back: its size, and the hash of what it holds.

    Raises:
        OSError: where it cannot be read.
    """
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
        return File(file.tell(), digest.hexdigest())


def complete(unfinished: Path, manifest: Manifest) -> Path:
    """Write the manifest, give the folder its name and point `latest` to it.

    Raises:
        OSError: where any of this cannot be written, or the file of another rank is not seen here.
    """
    for name, file in manifest.files.items():
        size = (unfinished / name).stat().st_size
        if size != file.bytes:
            raise OSError(f"{name} has {size:,} bytes, {file.bytes:,} were written; do all machines share the folder?")
        disk.sync(unfinished / name)
    disk.write(unfinished / MANIFEST, (json.dumps(asdict(manifest), indent=1) + "\n").encode())
    for folder in {(unfinished / name).parent for name in manifest.files} | {unfinished}:
        disk.sync(folder)
    root, final = unfinished.parent, unfinished.parent / f"step-{manifest.step}"
    _delete(final)
    unfinished.rename(final)
    disk.sync(root)
    point(root, LATEST, step=manifest.step)
    return final


def point(root: Path, pointer: str, *, step: int | None) -> None:
    """Have `LATEST` or `BEST` name the checkpoint of a step; None takes it away.

    Raises:
        OSError: where that cannot be written.
    """
    if step is None:
        (root / pointer).unlink(missing_ok=True)
        return
    unfinished = root / f".{pointer}.unfinished"
    disk.write(unfinished, f"step-{step}\n".encode())
    unfinished.replace(root / pointer)
    disk.sync(root)


def candidates(root: Path) -> tuple[list[Path], str | None]:
    """Return the checkpoints to go on from, the best first, and what is wrong with `latest`, if anything.

    The best is the one that `latest` names, then those of fewer steps. Where it names none that is there: all, by step.
    """
    steps = complete_steps(root)
    ordered = [steps[step] for step in sorted(steps, reverse=True)]
    pointer = root / LATEST
    if not pointer.is_file():
        return ordered, f"{pointer} is missing" if ordered else None
    name = pointer.read_text(errors="replace").strip()
    step = _step(name)
    if step is None or step not in steps:
        return ordered, f"{pointer} says {name!r}, and there is no such checkpoint"
    return [folder for folder in ordered if (step_of(folder) or 0) <= step], None


def read_manifest(folder: Path) -> Manifest:
    """
    Raises:
        BrokenCheckpointError: where it is none; MissingError, where it is not there.
        UnreadableError: where it cannot be read here.
    """
    path = folder / MANIFEST
    try:
        return _MANIFEST.validate_json(path.read_bytes())
    except ValidationError as error:
        raise BrokenCheckpointError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise MissingError(path) from error
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}") from error


def check_file(folder: Path, name: str, expected: File, *, content: bool = True) -> None:
    """Compare a file with its entry in the manifest.

    Args:
        content: whether to read it, rather than look at its size only.

    Raises:
        BrokenCheckpointError: naming it, and what is wrong; MissingError, where it is not there.
        UnreadableError: where it may be whole, and cannot be read here.
    """
    path = folder / name
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            raise BrokenCheckpointError(f"{path} has {size:,} bytes; {expected.bytes:,} were written")
        if content and describe(path).sha256 != expected.sha256:
            raise BrokenCheckpointError(f"{path} is not what was written: its SHA-256 differs from {MANIFEST}'s")
    except FileNotFoundError as error:
        raise MissingError(path) from error
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}") from error


def supersede(root: Path, step: int) -> list[Path]:
    """Move checkpoints of more steps aside: a run goes on from `step`, and will come to those steps again.

    Returns:
        What they are called now.
    """
    moved = []
    for folder in complete_steps(root).values():
        if (step_of(folder) or 0) > step:
            aside, number = folder.with_name(f"{folder.name}.aside"), 1
            while aside.exists():
                aside, number = folder.with_name(f"{folder.name}.aside.{number}"), number + 1
            moved.append(folder.rename(aside))
    return moved


def prune(root: Path, *, keep_last: int, keep_every: int | None, best: int | None = None) -> None:
    """Delete all checkpoints but the last ones, those whose step is a multiple of `keep_every`, and that of `best`.

    Raises:
        OSError: where one cannot be deleted.
    """
    steps = complete_steps(root)
    for step in sorted(steps)[:-keep_last]:
        if step != best and (keep_every is None or step % keep_every):
            _delete(steps[step])


def complete_steps(root: Path) -> dict[int, Path]:
    """Return step -> folder of every checkpoint that is complete."""
    return {step: folder for folder in root.glob("step-*") if (step := step_of(folder)) is not None}


def _delete(folder: Path) -> None:
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.deleted")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files, by their names, to the disk.

    Raises:
        OSError: where one cannot be written.
    """
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write(path, content)


def why(error: BaseException, folder: Path, nbytes: int | None = None) -> str:
    """Say why `nbytes` could not be written to `folder`, in the system's words.

    torch's writer puts its own in front of them, or in their place, for a disk that takes no more.
    """
    found: BaseException | None = error
    while found and not (isinstance(found, OSError) and found.strerror):
        found = found.__cause__ or found.__context__
    if isinstance(found, OSError):
        reason, full = f"{found.strerror}: {found.filename or folder}", found.errno in _FULL
    elif "enforce fail" in str(error):
        reason, full = f"{folder} takes no more", True
    else:
        return "".join(traceback.format_exception_only(error)).strip()
    if not full:
        return reason
    wanted = f"{nbytes:,} to write" if nbytes else "more to write"
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return f"{reason} ({shutil.disk_usage(there).free:,} bytes free, {wanted})"
