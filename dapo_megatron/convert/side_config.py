"""config.json: what it says about the model, and about the dtype of the weights, which a conversion may change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dapo_megatron.errors import ConfigError

_KEYS = ("dtype", "torch_dtype")


def read_config(folder: Path) -> Any:
    """Return config.json as transformers reads it, running none of the code that it may bring.

    Raises:
        ConfigError: where there is none, or transformers does not know what it describes.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{folder} has no config.json; it is not a whole Hugging Face checkpoint")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a broken config.json raises whatever the parser beneath it has
        raise ConfigError(f"cannot read {file}: {error}") from error


def declare_dtype(file: Path, dtype: str) -> None:
    """Have config.json say this dtype, if it says one. Where it does already, no byte changes."""
    config = json.loads(file.read_bytes())
    stale = [key for key in _KEYS if config.get(key, dtype) != dtype]
    if stale:
        config |= dict.fromkeys(stale, dtype)
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
