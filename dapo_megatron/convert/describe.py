"""Tells what a checkpoint holds, from its indexes and headers, without loading it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from dapo_megatron.convert.dist_files import CheckpointError, file_problems, peek_common, read_metadata
from dapo_megatron.convert.output import side_files
from dapo_megatron.convert.places import Place, resolve
from dapo_megatron.convert.tensors_file import INDEX, SINGLE, Spec, TensorsFile, read_index

_PROJECTION = "self_attention.linear_proj.weight"


def describe(path: Path) -> dict[str, Any]:
    """Return what is known about a checkpoint, as JSON has it.

    `kind` is huggingface, or megatron for torch_dist, whoever wrote it. `missing` lists, in sentences, what ought to be
    there and is not; empty for a checkpoint that is whole as far as can be told without reading its data.

    Raises:
        CheckpointError: where there is no checkpoint, or the index that everything else hangs on cannot be read.
    """
    place = resolve(path)
    return _megatron(place) if place.is_megatron else _huggingface(place.folder)


def _huggingface(folder: Path) -> dict[str, Any]:
    missing = [] if (folder / "config.json").is_file() else ["config.json is missing"]
    weight_map = read_index(folder)
    wanted = sorted(set(weight_map.values()))
    if not wanted:
        found = sorted(file.name for file in folder.glob("*.safetensors"))
        wanted = [SINGLE] if SINGLE in found else found
        missing += [] if wanted else ["no *.safetensors are there"]
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
        **_model_of(folder),
        **_tensors(specs.values()),
        "files": files,
        "side_files": [str(file) for file in side_files(folder)],
        "missing": missing,
    }


def _megatron(place: Place) -> dict[str, Any]:
    folder = place.folder
    metadata = read_metadata(folder)
    missing = file_problems(folder, metadata)
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
        step = common.get("iteration") if step is None else step
    except CheckpointError as error:
        missing.append(str(error))
    names = sorted({info.relative_path for info in metadata.storage_data.values()})
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
        "optimizer_and_other_state": {**_tensors(extra.values()), "objects": objects},
        "files": [{"name": name, "bytes": _size(folder / name)} for name in names],
        "side_files": [str(file) for file in side_files(place.hf)] if place.hf else [],
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
        }
    except (OSError, ValueError, AttributeError):
        return {"model_type": None}


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


def _cuts(model: dict[str, TensorStorageMetadata]) -> int | None:
    """Into how many parts tensor-parallel ranks had cut the weights of a layer."""
    value = next((value for key, value in model.items() if key.endswith(_PROJECTION)), None)
    return len({chunk.offsets[-1] for chunk in value.chunks}) if value else None


def as_text(found: dict[str, Any]) -> str:
    """Return the same for people."""
    lines = [f"{found['path']}"]
    kind = "Hugging Face" if found["kind"] == "huggingface" else "Megatron (torch_dist)"
    architecture = ", ".join(found.get("architectures") or []) or found["model_type"] or "architecture not told"
    lines.append(f"{kind}, {architecture}" + (", tied embeddings" if found.get("tied") else ""))
    if found.get("step") is not None:
        lines.append(f"step {found['step']}")
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in found["dtypes"].items())
    lines.append(f"{found['parameters']:,} parameters in {found['tensors']} tensors, {found['bytes'] / 1e9:.2f} GB")
    lines.append(f"numbers: {dtypes or 'none'}" + _declared(found))
    if found["kind"] == "megatron":
        lines.append(f"{found['layers']} layers, written tensor-parallel in {found['tensor_parallel']}")
        state = found["optimizer_and_other_state"]
        lines.append(
            f"other state: {state['tensors']} tensors, {state['bytes'] / 1e9:.2f} GB; {state['objects']} objects"
        )
    total = sum(file["bytes"] or 0 for file in found["files"])
    lines.append(f"{len(found['files'])} files with weights, {total / 1e9:.2f} GB")
    lines += [f"  {file['name']}  {_bytes(file['bytes'])}" for file in found["files"][:16]]
    if len(found["files"]) > 16:
        lines.append(f"  and {len(found['files']) - 16} more")
    lines.append(f"beside them: {', '.join(found['side_files']) or 'nothing'}")
    lines += [f"MISSING: {problem}" for problem in found["missing"]]
    return "\n".join(lines)


def _bytes(count: int | None) -> str:
    return "missing" if count is None else f"{count:,} bytes"


def _declared(found: dict[str, Any]) -> str:
    declared = found.get("declared_dtype")
    return f"; config.json declares {declared}" if declared and declared not in found["dtypes"] else ""
