"""Rows to prompts: fields, template, tokens, and the limit on their number."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dapo_megatron.config import DataConfig
from dapo_megatron.data.lossless import check_lossless
from dapo_megatron.data.sources import read_rows
from dapo_megatron.errors import ConfigError
from dapo_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def load_prompts(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, source: str, warn: Callable[[str], None] = log.warning
) -> list[Prompt]:
    """Read all prompts of `source` (see `read_rows`), in its order.

    A plain prompt gets the special tokens that the tokenizer adds; a chat template has put its own into the text.

    Args:
        warn: is told how many prompts were dropped, and from how many chat messages were, where any were.

    Raises:
        ConfigError: as `read_rows` and `encode`; for a row without question or answer, or with one of a wrong type, and
            for prompts that are too long, unless they are dropped.
    """
    uids, questions, answers = [], [], []
    shortened = 0
    for uid, row in read_rows(source):
        uids.append(uid)
        questions.append(_question(row, config.prompt_field, uid))
        given = _value(row, config.prompt_field, uid, "data.prompt_field")
        shortened += isinstance(given, list) and len(given) > 1
        answers.append(_answer(row, config.answer_field, uid))
    if shortened:
        warn(
            f"{shortened} of {len(uids)} prompts of {source} have other chat messages beside the user's last one, such "
            "as the system's; they are left out: what every prompt needs of them belongs into data.template"
        )
    encoded = encode(questions, uids, config, tokenizer)
    prompts = [
        Prompt(uid, token_ids, text, answer)
        for uid, (text, token_ids), answer in zip(uids, encoded, answers, strict=True)
    ]
    return _within_limit(prompts, config, source, warn)


def encode(
    questions: Sequence[str], uids: Sequence[str], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, tuple[int, ...]]]:
    """Return what the model is given for each question: its text, templates included, and the tokens of that.

    Args:
        uids: what to call each question.

    Raises:
        ConfigError: where chat_template is on and the tokenizer has none; for a question without tokens, and for those
            that the tokenizer changes (see `check_lossless`).
    """
    if config.chat_template and not tokenizer.chat_template:
        raise ConfigError("data.chat_template is true, but the tokenizer has no chat template; set it to false")
    texts = [_text(question, config, tokenizer) for question in questions]
    encoded = tokenizer(
        texts, add_special_tokens=not config.chat_template, return_special_tokens_mask=True, verbose=False
    )
    token_ids = [tuple(ids) for ids in encoded["input_ids"]]
    for uid, text, ids in zip(uids, texts, token_ids, strict=True):
        if not ids:
            raise ConfigError(f"{uid}: the prompt {text!r} has no tokens")
    own = [
        [token for token, added in zip(ids, mask, strict=True) if not added]
        for ids, mask in zip(token_ids, encoded["special_tokens_mask"], strict=True)
    ]
    check_lossless(tokenizer, texts, own, uids)
    return list(zip(texts, token_ids, strict=True))


def _within_limit(prompts: list[Prompt], config: DataConfig, source: str, warn: Callable[[str], None]) -> list[Prompt]:
    limit = config.max_prompt_tokens
    too_long = [prompt for prompt in prompts if len(prompt.token_ids) > limit]
    if not too_long:
        return prompts
    first = too_long[0]
    found = (
        f"{len(too_long)} of {len(prompts)} prompts of {source} are longer than data.max_prompt_tokens({limit}), the "
        f"first {first.uid} with {len(first.token_ids)} tokens"
    )
    longest = max(len(prompt.token_ids) for prompt in too_long)
    if config.long_prompts == "refuse":
        raise ConfigError(f"{found}; set data.max_prompt_tokens={longest} or data.long_prompts=drop")
    if len(too_long) == len(prompts):
        raise ConfigError(f"{found}: data.long_prompts=drop leaves none; set data.max_prompt_tokens={longest}")
    warn(f"{found}; they are left out")
    return [prompt for prompt in prompts if len(prompt.token_ids) <= limit]


def _text(question: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    text = config.template.replace("{problem}", question)
    if not config.chat_template:
        return text
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(rendered, str)
    return rendered


def _question(row: Mapping[str, Any], field: str, uid: str) -> str:
    value = _value(row, field, uid, "data.prompt_field")
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, Mapping) and turn.get("role") == "user"]
        if not turns:
            raise ConfigError(f"{uid}: {field} is a list without a chat message of role 'user'")
        value = turns[-1].get("content")
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{uid}: the question in {field} must be text or a list of chat messages; got {value!r}")
    check_characters(value, f"{uid}: the question in {field}")
    return value


def _answer(row: Mapping[str, Any], field: str, uid: str) -> str:
    """Integers as their digits. Floating numbers are refused: whether 34.0 means 34 is for the data to say."""
    value = _value(row, field, uid, "data.answer_field")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(
            f"{uid}: the answer in {field} must be text or an integer; got {value!r} ({type(value).__name__})"
        )
    check_characters(value, f"{uid}: the answer in {field}")
    return value


def check_characters(text: str, what: str) -> None:
    """
    Raises:
        ConfigError: where a text has half a character, which no file can hold; `what` is what it is called.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what} has half a character: {error}") from error


def _value(row: Mapping[str, Any], field: str, uid: str, key: str) -> Any:
    value: Any = row
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            here = f"has {', '.join(map(str, value))}" if isinstance(value, Mapping) else f"is {type(value).__name__}"
            raise ConfigError(f"{uid}: no field {field!r} ({key}); where {part!r} should be, the row {here}")
        value = value[part]
    return value
