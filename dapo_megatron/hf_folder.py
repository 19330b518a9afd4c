"""Reads the folder of a Hugging Face checkpoint without torch: what it has to hold, what its config.json says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_megatron.errors import ConfigError

_FUSED = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<what>gate_up|down)_proj")


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """Where a tensor of one expert is in that of all experts: `fused[expert, begin:end]`."""

    expert: int
    begin: int
    end: int


def expert_parts(name: str, shape: Sequence[int]) -> dict[str, ExpertPart]:
    """Take apart a tensor that joins all experts of a layer, as transformers keeps them in memory.

    Checkpoints that publishers have, and transformers' own, name each tensor of each expert. One that was saved with
    the names of the modules has [experts, rows, columns], without `.weight`; gate and up are joined along the rows.

    Returns:
        Name of an expert's tensor, such as `model.layers.0.mlp.experts.7.up_proj.weight` -> its part; empty where
        `name` is no such tensor.
    """
    found = _FUSED.fullmatch(name)
    if found is None or len(shape) != 3:
        return {}
    experts, rows, _ = shape
    half = rows // 2
    parts = {"gate": (0, half), "up": (half, rows)} if found["what"] == "gate_up" else {"down": (0, rows)}
    return {
        f"{found['experts']}.{expert}.{what}_proj.weight": ExpertPart(expert, begin, end)
        for expert in range(experts)
        for what, (begin, end) in parts.items()
    }


def read_hf_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """Return config.json as transformers reads it.

    Raises:
        ConfigError: where `path` is no folder of a checkpoint with *.safetensors, or its config.json cannot be read.
    """
    if not path.is_dir():
        raise ConfigError(
            f"model.path {path} is not a folder; give the folder of a Hugging Face checkpoint (config.json, "
            f"*.safetensors, tokenizer)"
        )
    if not (path / "config.json").is_file():
        raise ConfigError(f"model.path {path} has no config.json; it is not a Hugging Face checkpoint")
    if problem := lacks_safetensors(path):
        raise ConfigError(f"model.path {path} {problem}")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken config.json raises whatever the parser beneath it has
        raise ConfigError(f"cannot read {path / 'config.json'}: {error}") from error


def count_numbers(path: Path) -> int:
    """Return how many numbers the tensors of the checkpoint have together, without reading them.

    Raises:
        ConfigError: as `tensor_files`.
    """
    from safetensors import SafetensorError, safe_open

    names: dict[Path, list[str]] = {}
    for name, file in tensor_files(path).items():
        names.setdefault(file, []).append(name)
    total = 0
    try:
        for file, inside in names.items():
            with safe_open(file, framework="numpy") as opened:
                total += sum(math.prod(opened.get_slice(name).get_shape()) for name in inside)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.path: cannot read the weights in {path}: {error}") from error
    return total


def lacks_safetensors(folder: Path) -> str | None:
    """Return that a folder has no *.safetensors, what it has instead and what to do, as "has no ..."; None if it has.

    pytorch_model.bin is not read: it is a pickle, and may run what it holds.
    """
    if any(folder.glob("*.safetensors")):
        return None
    pickles = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    if not pickles:
        return "has no *.safetensors, and no pytorch_model.bin to make them from; is the download complete?"
    more = f" and {len(pickles) - 1} more" if len(pickles) > 1 else ""
    return (
        f"has no *.safetensors; its weights are in {pickles[0]}{more}, which is not read. Write them as safetensors "
        f"with transformers: AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto')"
        ".save_pretrained('NEW_FOLDER'), the same with AutoTokenizer, without dtype, and give NEW_FOLDER"
    )


def tensor_files(path: Path) -> dict[str, Path]:
    """Return where every tensor of the checkpoint is, by name: in the files that transformers would read.

    Those are the files of the index, or model.safetensors. Some folders hold the same weights once more, under other
    names, for other programs. Without either, all *.safetensors count.

    Raises:
        ConfigError: where a file that the index names is missing, or a file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    try:
        if index.is_file():
            files = {path / file for file in json.loads(index.read_text())["weight_map"].values()}
        else:
            files = {single} if single.is_file() else set(path.glob("*.safetensors"))
        found: dict[str, Path] = {}
        for file in sorted(files):
            with safe_open(file, framework="numpy") as opened:
                found |= dict.fromkeys(opened.keys(), file)
    except (OSError, ValueError, LookupError, SafetensorError) as error:
        raise ConfigError(f"model.path: cannot read the weights in {path}: {error}") from error
    return found
