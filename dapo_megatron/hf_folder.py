"""Reads the folder of a Hugging Face checkpoint without torch: what it has to hold, what its config.json says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dapo_megatron.errors import ConfigError


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
    if not any(path.glob("*.safetensors")):
        raise ConfigError(
            f"model.path {path} has no *.safetensors; convert other formats with save_pretrained of transformers"
        )
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken config.json raises whatever the parser beneath it has
        raise ConfigError(f"cannot read {path / 'config.json'}: {error}") from error


def tensor_names(path: Path) -> set[str]:
    """Return the names of all tensors in *.safetensors."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            names.update(opened.keys())
    return names
