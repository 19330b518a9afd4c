"""What `describe` found, as text for people."""

from __future__ import annotations

from typing import Any

from dapo_megatron.units import counted, size


def as_text(found: dict[str, Any]) -> str:
    """Return it as lines."""
    lines = [f"{found['path']}"]
    kind = "Hugging Face" if found["kind"] == "huggingface" else "Megatron (torch_dist)"
    architecture = ", ".join(found.get("architectures") or []) or found["model_type"] or "architecture not told"
    lines.append(f"{kind}, {architecture}" + (", tied embeddings" if found.get("tied") else ""))
    if found.get("step") is not None:
        lines.append(f"step {found['step']}")
    if found["tensors"]:
        tensors = counted(found["tensors"], "tensor")
        lines.append(f"{counted(found['parameters'], 'parameter')} in {tensors}, {size(found['bytes'])}")
        dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in found["dtypes"].items())
        lines.append(f"numbers: {dtypes}" + _declared(found))
    if found["kind"] == "megatron":
        lines += _megatron(found)
    total = sum(file["bytes"] or 0 for file in found["files"])
    lines.append(f"{counted(len(found['files']), 'file')} with weights" + (f", {size(total)}" if total else ""))
    lines += [f"  {file['name']}  {_size(file['bytes'])}" for file in found["files"][:16]]
    if len(found["files"]) > 16:
        lines.append(f"  and {len(found['files']) - 16} more")
    lines.append(f"beside them: {', '.join(found['side_files']) or 'nothing'}")
    lines += [f"note: {note}" for note in found["notes"]]
    lines += [f"MISSING: {problem}" for problem in found["missing"]]
    return "\n".join(lines)


def _megatron(found: dict[str, Any]) -> list[str]:
    lines = []
    if found["layers"]:
        cuts = found["tensor_parallel"]
        lines.append(
            f"{counted(found['layers'], 'layer')}, "
            + (f"cut tensor-parallel in {cuts}" if cuts > 1 else "not cut tensor-parallel")
        )
    state = found["optimizer_and_other_state"]
    if state["tensors"] or state["objects"]:
        tensors = f"{counted(state['tensors'], 'tensor')}, {size(state['bytes'])}; " if state["tensors"] else ""
        lines.append(f"other state: {tensors}{counted(state['objects'], 'object')}")
    if manifest := found["manifest"]:
        axes = ("tp", "pp", "vpp", "cp", *(["ep"] if manifest["parallel"].get("ep", 1) > 1 else []))
        mesh = " x ".join(f"{axis}({manifest['parallel'].get(axis, 1)})" for axis in axes)
        lines.append(
            f"saved {manifest['written']} by dapo-megatron {manifest['dapo_megatron']}, "
            f"{counted(manifest['world_size'], 'rank')}, {mesh}"
        )
        how = "SHA-256" if manifest["checked"] == "hashes" else "sizes only (--hashes reads them)"
        lines.append(f"manifest.json: {counted(manifest['files'], 'file')}, compared by {how}")
    return lines


def _declared(found: dict[str, Any]) -> str:
    declared = found.get("declared_dtype")
    return f"; config.json declares {declared}" if declared and declared not in found["dtypes"] else ""


def _size(nbytes: int | None) -> str:
    return "missing" if nbytes is None else size(nbytes)
