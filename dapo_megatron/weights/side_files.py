"""What lies beside the weights of a Hugging Face checkpoint: tokenizer, chat template, code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
_MODULE = "tokenizer_of_file"
_CODE = '''"""Has AutoTokenizer read tokenizer.json as it is."""

from transformers import PreTrainedTokenizerFast


class TokenizerOfFile(PreTrainedTokenizerFast):
    pass
'''


def copy_side_files(source: Path, target: Path) -> None:
    """Copy every file beside the weights but the list of their shards."""
    for file in source.iterdir():
        if file.is_file() and file.suffix in _SUFFIXES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)


def declare_tokenizer(folder: Path) -> None:
    """Have `AutoTokenizer` give the ids of tokenizer.json in `folder`, which holds a config.json.

    For some architectures, qwen2 among them, transformers 5 takes the tokenizer class that belongs to them: it builds
    normalizer and pre-tokenizer itself around the vocabulary, whatever the file says. Where the result differs,
    tokenizer_config.json names a class of the checkpoint's own. Without trust_remote_code transformers then takes the
    plain class, which reads the file; with it, the class named, which is the plain one.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    if not (folder / "tokenizer.json").is_file() or "auto_map" in config:
        return
    written = _parts(PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))
    try:
        same = written == _parts(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except Exception:  # a class that cannot be built from this file raises whatever it stumbles over
        same = False
    if same:
        return
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["auto_map"] = {"AutoTokenizer": [None, f"{_MODULE}.TokenizerOfFile"]}
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / f"{_MODULE}.py").write_text(_CODE)


def _parts(tokenizer: Any) -> dict[str, Any]:
    """Return what decides ids and text, without options that move offsets only or that a decoder does not look at."""
    parts = json.loads(
        tokenizer.backend_tokenizer.to_str(),
        object_hook=lambda part: {key: value for key, value in part.items() if key != "trim_offsets"},
    )
    if parts["decoder"] and parts["decoder"]["type"] == "ByteLevel":
        parts["decoder"] = "ByteLevel"
    return parts
