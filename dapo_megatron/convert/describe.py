"""Tells what a checkpoint holds, from its indexes and headers, without loading it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from dapo_megatron.actor.architecture import SUPPORTED
from dapo_megatron.checkpoint.folder import MANIFEST
from dapo_megatron.convert.dist_files import COMMON, FORMAT, CheckpointError, file_problems, peek_common, read_metadata
from dapo_megatron.convert.output import side_files
from dapo_megatron.convert.places import HF, Place, resolve
from dapo_megatron.convert.run_checkpoint import differences, is_of_a_run, manifest_of
from dapo_megatron.convert.tensors_file import INDEX, SINGLE, Spec, TensorsFile, read_index
from dapo_megatron.hf_folder import lacks_safetensors

_PROJECTION = "self_attention.linear_proj.weight"


def describe(path: Path, hashes: TextIO | None = None) -> dict[str, Any]:
    """Return what is known about a checkpoint, as JSON has it.

    `kind` is huggingface, or megatron for torch_dist, whoever wrote it. `missing` lists, in sentences, what ought to be
    there and is not; empty for a checkpoint that is whole as far as can be told without reading its data. `notes` are
    sentences for people. `manifest` is that of a run's checkpoint, but for the files, and how these were `checked`: by
    sizes or hashes.

    Args:
        hashes: where progress is shown while all files of a run's checkpoint are read for their SHA-256; None compares
            sizes only.

    Raises:
        CheckpointError: where there is no checkpoint, or hashes are wanted of one that has none.
    """
    place = resolve(path)
    if hashes and not place.of_run:
        raise CheckpointError(f"--hashes compares with {MANIFEST}, which only a run's checkpoints have; {path} is none")
    return _megatron(place, hashes) if place.is_megatron else _huggingface(place.folder)


def _huggingface(folder: Path) -> dict[str, Any]:
    missing = [] if (folder / "config.json").is_file() else ["config.json is missing"]
    try:
        weight_map = read_index(folder)
    except CheckpointError as error:
        weight_map = {}
        missing.append(str(error))
    wanted = sorted(set(weight_map.values()))
    told = _model_of(folder)
    notes = _not_converted(told)
    if not wanted:
        found = sorted(file.name for file in folder.glob("*.safetensors"))
        wanted = [SINGLE] if SINGLE in found else found
        if not wanted and (beside := _weights_beside(folder)):
            notes.append(f"config and tokenizer only: the weights are in the checkpoint beside it, {beside}")
        elif not wanted and (problem := lacks_safetensors(folder)):
            missing.append(f"{folder} {problem}")
    files: list[dict[str, Any]] = []
    specs: dict[str, Spec] = {}
    for name in wanted:
        lost = sum(file == name for file in weight_map.values())
        if not (folder / name).is_file():
            missing.append(f"{name} is missing, and {lost} tensors with it, which {INDEX} places there")
            continue
        try:
            held = TensorsFile(folder / name).specs
        except CheckpointError as error:
            missing.append(str(error))
            continue
        files.append({"name": name, "bytes": (folder / name).stat().st_size, "tensors": len(held)})
        absent = sorted(tensor for tensor, file in weight_map.items() if file == name and tensor not in held)
        missing += [f"{name} lacks {len(absent)} tensors of {INDEX}, such as {absent[0]}"] if absent else []
        specs |= held
    return {
        "kind": "huggingface",
        "path": str(folder),
        **told,
        **_tensors(specs.values()),
        "files": files,
        "side_files": [str(file) for file in side_files(folder)],
        "notes": notes,
        "missing": missing,
    }


def _weights_beside(folder: Path) -> Path | None:
    """The Megatron checkpoint that a folder with what lies beside the weights belongs to."""
    parent = folder.absolute().parent
    is_beside = folder.absolute().name == HF and ((parent / FORMAT).is_file() or is_of_a_run(parent))
    return parent if is_beside else None


def _not_converted(told: dict[str, Any]) -> list[str]:
    name = told["model_type"]
    known = name is None or name in SUPPORTED
    notes = [] if known else [f"architecture {name} cannot be converted; {', '.join(SUPPORTED)} can"]
    if method := told.get("quantised"):
        notes.append(f"the weights are quantised ({method}), and such cannot be converted")
    return notes


def _of_run(folder: Path, hashes: TextIO | None) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """What the manifest of a run's checkpoint says, and file -> what is wrong with it."""
    try:
        manifest = manifest_of(folder)
    except CheckpointError as error:
        return None, {MANIFEST: str(error)}
    told = asdict(manifest)
    del told["files"]
    told |= {"files": len(manifest.files), "checked": "hashes" if hashes else "sizes"}
    return told, differences(folder, manifest.files, hashes)


def _index(place: Place) -> tuple[Metadata, list[str]]:
    """What `.metadata` says, and what is wrong with the files that it names."""
    try:
        metadata = read_metadata(place.folder)
    except CheckpointError as error:
        return Metadata({}), [str(error).removeprefix(f"{place.folder}/")]
    return metadata, file_problems(place.folder, metadata)


def _megatron(place: Place, hashes: TextIO | None) -> dict[str, Any]:
    folder = place.folder
    manifest, damaged = _of_run(place.of_run, hashes) if place.of_run else (None, {})
    metadata, problems = _index(place)
    # A file that both tell of is told of once.
    problems = [problem for problem in problems if problem.split()[0] not in damaged]
    missing = [*place.problems, *damaged.values(), *problems]
    model: dict[str, TensorStorageMetadata] = {}
    others: dict[str, TensorStorageMetadata] = {}
    objects = 0
    for key, value in metadata.state_dict_metadata.items():
        if isinstance(value, BytesStorageMetadata):
            objects += 1
            continue
        (model if key.startswith(("embedding.", "decoder.", "output_layer.")) else others)[key] = value
        have = sum(chunk.sizes.numel() for chunk in value.chunks)
        if have != value.size.numel():
            missing.append(f"{key} has chunks of {have:,} numbers, and {value.size.numel():,} belong to it")
    step: Any = place.step
    try:
        common = peek_common(folder)
        # A converted model has done no steps; Megatron-LM wants the number all the same.
        step = (common.get("iteration") or None) if step is None else step
    except CheckpointError as error:
        missing += [] if COMMON in damaged else [str(error)]
    names = sorted({info.relative_path for info in (metadata.storage_data or {}).values()})
    told = _model_of(place.hf) if place.hf else {"model_type": None}
    rows = told.get("vocab_size")
    specs = {key: Spec(value.properties.dtype, _unpadded(key, value.size, rows)) for key, value in model.items()}
    extra = {key: Spec(value.properties.dtype, tuple(value.size)) for key, value in others.items()}
    return {
        "kind": "megatron",
        "format": "torch_dist",
        "path": str(folder),
        "step": step if isinstance(step, int) else None,
        **told,
        **_tensors(specs.values()),
        "layers": _layers(model),
        "tensor_parallel": _cuts(model),
        "manifest": manifest,
        "optimizer_and_other_state": {**_tensors(extra.values()), "objects": objects},
        "files": [{"name": name, "bytes": _size(folder / name)} for name in names],
        "side_files": [str(file) for file in side_files(place.hf)] if place.hf else [],
        "notes": [*_not_converted(told), *_stacked(model)],
        "missing": missing,
    }


def _unpadded(key: str, size: torch.Size, vocab_size: Any) -> tuple[int, ...]:
    """Without the rows that pad the vocabulary, where it is known how many words there are."""
    is_vocabulary = key.startswith(("embedding.", "output_layer.")) and isinstance(vocab_size, int)
    return (min(size[0], vocab_size), *size[1:]) if is_vocabulary else tuple(size)


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _model_of(folder: Path) -> dict[str, Any]:
    """What config.json says, without transformers, so that unknown architectures are told, too."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        return {
            "model_type": config.get("model_type"),
            "architectures": config.get("architectures"),
            "declared_dtype": config.get("dtype") or config.get("torch_dtype"),
            "tied": config.get("tie_word_embeddings"),
            "vocab_size": config.get("vocab_size"),
            "quantised": _quantised(config),
        }
    except (OSError, ValueError, AttributeError):
        return {"model_type": None}


def _quantised(config: dict[str, Any]) -> str | None:
    """By which method, where config.json says that the weights are."""
    how = config.get("quantization_config") or config.get("compression_config")
    return str(how.get("quant_method", "no method named")) if isinstance(how, dict) else None


def _tensors(specs: Iterable[Spec]) -> dict[str, Any]:
    specs = list(specs)
    numbers: Counter[str] = Counter()
    for spec in specs:
        numbers[str(spec.dtype).removeprefix("torch.")] += torch.Size(spec.shape).numel()
    return {
        "tensors": len(specs),
        "parameters": numbers.total(),
        "bytes": sum(spec.nbytes for spec in specs),
        "dtypes": dict(numbers.most_common()),
    }


def _layers(model: dict[str, TensorStorageMetadata]) -> int | None:
    """How many layers the chunks belong to: along the first axis, or, where layers differ, by their names."""
    together = model.get(f"decoder.layers.{_PROJECTION}")
    apart = sum(key.endswith(_PROJECTION) for key in model)
    return together.size[0] if together else apart or None


def _stacked(model: dict[str, TensorStorageMetadata]) -> list[str]:
    if f"decoder.layers.{_PROJECTION}" not in model:
        return []
    return ["a tensor here is of all layers together, and may join several, so that Hugging Face's format has more"]


def _cuts(model: dict[str, TensorStorageMetadata]) -> int | None:
    """Into how many parts tensor-parallel ranks had cut the weights of a layer."""
    value = next((value for key, value in model.items() if key.endswith(_PROJECTION)), None)
    return len({chunk.offsets[-1] for chunk in value.chunks}) if value else None
