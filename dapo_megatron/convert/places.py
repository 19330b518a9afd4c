"""Finds the checkpoint that a path means, whoever wrote it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dapo_megatron.convert.dist_files import FORMAT, CheckpointError
from dapo_megatron.convert.tensors_file import INDEX

HF = "hf"
"""Folder of a Megatron checkpoint with what lies beside the weights in Hugging Face's form."""
_TRACKER = "latest_checkpointed_iteration.txt"
_RUN, _LATEST = "checkpoints", "latest"
_STEP = re.compile(r"(?:step-|iter_)(\d+)")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a checkpoint lies."""

    folder: Path
    """The one with the weights: with metadata.json, or with *.safetensors."""
    is_megatron: bool
    step: int | None = None
    """As folder names tell; None where they do not."""
    hf: Path | None = None
    """Of a Megatron checkpoint, the folder with Hugging Face's config.json, where it has one."""


def resolve(path: Path) -> Place:
    """Return the checkpoint that is meant by a folder: itself, or the newest of a run or of Megatron-LM's.

    Raises:
        CheckpointError: where there is none. It says what was looked for.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; give the folder of a checkpoint")
    if place := _megatron(path):
        return place
    if (path / _TRACKER).is_file():
        return _tracked(path)
    for runs in (path / _RUN, path):
        if steps := _steps(runs):
            # A step that a save was cut short in has no metadata.json, and the one before is the newest.
            if place := next((place for step in steps if (place := _megatron(step))), None):
                return place
            raise CheckpointError(
                f"{runs}: none of {len(steps)} checkpoints, {steps[0].name} the newest, is complete: no {FORMAT}"
            )
    if (path / "config.json").is_file() or (path / INDEX).is_file() or any(path.glob("*.safetensors")):
        return Place(path, is_megatron=False)
    raise CheckpointError(
        f"{path} holds no checkpoint: neither {FORMAT} (Megatron), nor {_TRACKER} (Megatron-LM), nor {_RUN}/step-N (a "
        "run), nor config.json with *.safetensors (Hugging Face)"
    )


def _steps(folder: Path) -> list[Path]:
    """Folders of steps, the newest first; before them, the one that a run points to as its latest."""
    found = [(int(match[1]), entry) for entry in _folders(folder) if (match := _STEP.fullmatch(entry.name))]
    steps = [entry for _, entry in sorted(found, reverse=True)]
    latest = folder / _LATEST
    name = latest.read_text(errors="replace").strip() if latest.is_file() else None
    return sorted(steps, key=lambda entry: entry.name != name)


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def _megatron(folder: Path) -> Place | None:
    """The checkpoint in this folder, or in the one folder in it that has one."""
    inner = [entry for entry in (folder, *_folders(folder)) if (entry / FORMAT).is_file()]
    # A folder of several checkpoints is not one of them.
    if not inner or (inner[0] != folder and (len(inner) > 1 or _STEP.fullmatch(inner[0].name))):
        return None
    match = _STEP.fullmatch(folder.name)
    sides = (inner[0] / HF, folder / HF)
    hf = next((side for side in sides if (side / "config.json").is_file()), None)
    return Place(inner[0], is_megatron=True, step=int(match[1]) if match else None, hf=hf)


def _tracked(path: Path) -> Place:
    """What Megatron-LM's tracker points to."""
    word = (path / _TRACKER).read_text(errors="replace").strip()
    name = word if word == "release" else f"iter_{int(word):07d}" if word.isdecimal() else None
    if name is None:
        raise CheckpointError(f"{path / _TRACKER} says {word[:40]!r}; a number or 'release' is expected")
    place = _megatron(path / name) if (path / name).is_dir() else None
    if place is None:
        raise CheckpointError(
            f"{path / _TRACKER} points to {name}, which holds no {FORMAT}; convert other formats with Megatron-LM "
            "(--ckpt-convert-format torch_dist)"
        )
    side = path / HF
    if place.hf is None and (side / "config.json").is_file():
        return Place(place.folder, is_megatron=True, step=place.step, hf=side)
    return place
