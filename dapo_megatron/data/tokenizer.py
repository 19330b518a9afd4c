"""The tokenizer of a checkpoint and the tokens that end a response."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dapo_megatron.errors import ConfigError
from dapo_megatron.types import Decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer in the folder of a Hugging Face checkpoint. Never goes to the network.

    A tokenizer.json is taken as it is. `AutoTokenizer` of transformers 5 does not do that: for a checkpoint of type
    qwen2 it puts Qwen2's own normalizer and pre-tokenizer around the vocabulary, whatever the file says.

    Raises:
        ConfigError: where the folder holds no tokenizer, or one that cannot be loaded.
    """
    folder = Path(path)
    if not any((folder / name).is_file() for name in _FILES):
        raise ConfigError(f"no tokenizer in {folder}; expected one of {', '.join(_FILES)}")

    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (folder / "tokenizer.json").is_file() and not (trust_remote_code and _has_code(folder)):
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # broken files raise whatever the parser beneath has: KeyError, ValueError, OSError, ...
        raise ConfigError(f"cannot load the tokenizer in {folder}: {error}") from error


def _has_code(folder: Path) -> bool:
    """Tell whether the checkpoint brings a tokenizer class of its own."""
    config = folder / "tokenizer_config.json"
    return config.is_file() and "auto_map" in json.loads(config.read_text(encoding="utf-8"))


def end_token_ids(tokenizer: PreTrainedTokenizerBase, extra: Iterable[int]) -> tuple[int, ...]:
    """Collect the tokens that end a response: the tokenizer's end token, then `extra`, each once.

    Raises:
        ConfigError: where there is none, or one that the tokenizer does not have.
    """
    own = tokenizer.eos_token_id
    assert own is None or isinstance(own, int)
    ends = tuple(dict.fromkeys(extra if own is None else (own, *extra)))
    if not ends:
        raise ConfigError("the tokenizer has no end token; give rollout.stop_token_ids, or responses never end")
    if unknown := [token for token in ends if not 0 <= token < len(tokenizer)]:
        raise ConfigError(f"rollout.stop_token_ids: {unknown} are not among the tokenizer's {len(tokenizer)} tokens")
    return ends


def decoder(tokenizer: PreTrainedTokenizerBase) -> Decode:
    """Return what turns token ids into text: special tokens are left out, blanks stay as they were written.

    The text is made without the interpreter's lock wherever the tokenizer is one of the tokenizers library.
    """
    from transformers import PreTrainedTokenizerFast

    if type(tokenizer) is PreTrainedTokenizerFast:
        # What its own decode comes to, which first walks over the ids in Python.
        backend = tokenizer.backend_tokenizer
        return lambda token_ids: backend.decode(token_ids.tolist(), skip_special_tokens=True)
    # Models have padded vocabularies. The tokenizers library passes over ids that no token has; others may raise.
    known = len(tokenizer)
    return lambda token_ids: str(
        tokenizer.decode(
            token_ids[token_ids < known].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    )
