"""Finds the checkpoint that a path means, whoever wrote it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from dapo_megatron.checkpoint.folder import candidates
from dapo_megatron.convert.dist_files import FORMAT, CheckpointError
from dapo_megatron.convert.run_checkpoint import CHECKPOINTS, is_of_a_run
from dapo_megatron.convert.tensors_file import INDEX

HF = "hf"
"""Folder of a Megatron checkpoint with what lies beside the weights in Hugging Face's form."""
_TRACKER = "latest_checkpointed_iteration.txt"
_RUN = ("versions.json", "config.yaml")
"""What a run writes first."""
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
    of_run: Path | None = None
    """Of a checkpoint of a run, the folder that its manifest tells of."""
    problems: tuple[str, ...] = ()
    """What was found amiss on the way to it, as sentences."""


def resolve(path: Path) -> Place:
    """Return the checkpoint that is meant by a folder: itself, or the latest of a run or of Megatron-LM's.

    Raises:
        CheckpointError: where there is none. It says what was looked for.
    """
    if not path.is_dir():
        said = "is a file; give the folder that it lies in" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {said}")
    if place := _megatron(path):
        return place
    if (path / _TRACKER).is_file():
        return _tracked(path)
    for steps in (path / CHECKPOINTS, path):
        if place := _latest(steps):
            return place
    if (path / "config.json").is_file() or (path / INDEX).is_file() or any(path.glob("*.safetensors")):
        return Place(path, is_megatron=False)
    run = path.absolute().parent if path.absolute().name == CHECKPOINTS else path
    if all((run / name).is_file() for name in _RUN):
        final = f"; {run / HF} holds the model that it ended with" if (run / HF / "config.json").is_file() else ""
        raise CheckpointError(f"{run} is a run that has saved no step yet (checkpoint.every){final}")
    raise CheckpointError(
        f"{path} holds no checkpoint: neither {FORMAT} (Megatron), nor {_TRACKER} (Megatron-LM), nor "
        f"{CHECKPOINTS}/step-N (a run), nor config.json with *.safetensors (Hugging Face)"
    )


def _latest(folder: Path) -> Place | None:
    """Of folders of steps, the one that a run would go on from, as far as can be told without reading it."""
    steps, problem = candidates(folder)
    problems = [problem] if problem else []
    if not steps:  # Megatron-LM's, without its tracker
        numbered = [(step, entry) for entry in _folders(folder) if (step := _step(entry)) is not None]
        steps = [entry for _, entry in sorted(numbered, reverse=True)]
        problems = []
    for step in steps:
        # One that was cut short, or only copied in part, has no metadata.json.
        if any((entry / FORMAT).is_file() for entry in (step, *_folders(step))) and (place := _megatron(step)):
            return replace(place, problems=tuple(problems))
        problems.append(f"{step} has no {FORMAT}; it is not complete")
    if steps:
        raise CheckpointError(
            f"{folder}: none of {len(steps)} checkpoints, {steps[0].name} the newest, is complete: no {FORMAT}"
        )
    return None


def _step(folder: Path) -> int | None:
    match = _STEP.fullmatch(folder.absolute().name)
    return int(match[1]) if match else None


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def _megatron(folder: Path) -> Place | None:
    """The checkpoint in this folder, or in the one folder in it that has one."""
    inner = [entry for entry in (folder, *_folders(folder)) if (entry / FORMAT).is_file()]
    of_run = folder if is_of_a_run(folder) else None
    if of_run and not inner:  # what it lacks is told from its manifest
        inner = [folder]
    # A folder of several checkpoints is not one of them.
    if not inner or (inner[0] != folder and (len(inner) > 1 or _STEP.fullmatch(inner[0].name))):
        return None
    sides = (inner[0] / HF, folder / HF)
    hf = next((side for side in sides if (side / "config.json").is_file()), None)
    return Place(inner[0], is_megatron=True, step=_step(folder), hf=hf, of_run=of_run)


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
        return replace(place, hf=side)
    return place
