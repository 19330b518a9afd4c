"""Checks that a tokenizer keeps what it is given: text to tokens and back."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dapo_megatron.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXCERPT = 20
"""Characters that are shown before and after the first difference."""
_NAMED = 5
"""Lost characters that an error names."""


def check_lossless(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], token_ids: Sequence[Sequence[int]], uids: Sequence[str]
) -> None:
    """Refuse prompts that read differently once they are tokens: the model would be trained on other questions.

    Every prompt is decoded, which takes about a fifth of the time of encoding it. Two differences are no loss:

    - canonically equivalent Unicode, such as the composed é (NFC) that Qwen2 makes of e and an accent. Compatibility
      forms (NFKC) are another matter: they turn x² into x2;
    - one blank at the beginning, which SentencePiece adds or takes away, and behind a token that is taken out of the
      text first, such as those of a chat template: there it begins anew.

    Args:
        token_ids: the tokens of each text, without those that the tokenizer adds around it.
        uids: what to call each text.

    Raises:
        ConfigError: naming the first such prompt and the characters at fault.
    """
    back = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in map(list, token_ids)]
    added = _added(tokenizer)
    pairs = enumerate(zip(texts, back, strict=True))
    lost = [index for index, (text, read) in pairs if not _same(text, str(read), added)]
    if not lost:
        return
    text, read = texts[lost[0]], str(back[lost[0]])
    raise ConfigError(
        f"model.path: the tokenizer changes {len(lost)} of {len(texts)} prompts. The first is {uids[lost[0]]}: "
        f"{_around(text, read)} comes back as {_around(read, text)}; {_culprits(tokenizer, text)}. The model would be "
        f"trained on other questions than these: change the prompts, or give the tokenizer that belongs to the model"
    )


def _added(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches what the tokenizer takes out of a text before anything else."""
    own: Any = tokenizer
    tokens = sorted({*own.get_added_vocab(), *own.all_special_tokens}, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, tokens)) or '(?!)'})")


def _same(text: str, read: str, added: re.Pattern[str]) -> bool:
    if text == read:
        return True
    pieces, back = added.split(text), added.split(read)
    return len(pieces) == len(back) and all(map(_alike, pieces, back))


def _alike(text: str, read: str) -> bool:
    text, read = unicodedata.normalize("NFC", text), unicodedata.normalize("NFC", read)
    return read in (text, f" {text}", text.removeprefix(" "))


def _around(text: str, other: str) -> str:
    """Quote the place where `text` begins to differ from `other`."""
    place = next(
        (index for index, pair in enumerate(zip(text, other, strict=False)) if pair[0] != pair[1]),
        min(len(text), len(other)),
    )
    start, end = max(0, place - _EXCERPT), place + _EXCERPT
    return f"{'...' * (start > 0)}{text[start:end]!r}{'...' * (end < len(text))}"


def _culprits(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Name the characters that do not survive even alone, and what becomes of them."""
    lost = list(_lost_characters(tokenizer, text))
    if not lost:
        return "every character survives alone, so it is how the tokenizer splits or joins them that loses something"
    more = f", and {len(lost) - _NAMED} more characters" if len(lost) > _NAMED else ""
    return ", ".join(lost[:_NAMED]) + more


def _lost_characters(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterable[str]:
    def through(piece: str) -> tuple[list[int], str]:
        ids = tokenizer.encode(piece, add_special_tokens=False)
        return ids, str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    for character in dict.fromkeys(text):
        twice = character * 2  # of a single blank, one at the beginning may be gone
        if not _alike(twice, through(twice)[1]):
            ids, read = through(character)
            yield f"{character!r} becomes {f'tokens {ids}, {read!r}' if ids else 'nothing'}"
