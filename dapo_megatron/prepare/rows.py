"""Rows to problems: the fields, the text around a problem, the answer, its language, and whether it has an image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dapo_megatron.data.prompts import check_characters
from dapo_megatron.data.sources import read_rows
from dapo_megatron.errors import ConfigError
from dapo_megatron.prepare.sets import WRAPPERS, Answers
from dapo_megatron.prepare.sources import Source

PROMPT_FIELDS = ("prompt", "problem", "question")
ANSWER_FIELDS = ("reward_model.ground_truth", "answer")
"""Fields that are looked for in the first row of a source, in this order."""
_AROUND = [tuple(template.split("{problem}")) for template in WRAPPERS]
_IMAGE_FIELDS = ("image", "images")
_IMAGE = re.compile(r"https?://|!\[[^\]]*\]\(|<img\b|<image>|\\includegraphics", re.IGNORECASE)
"""Any link counts: what is behind it belongs to the problem, and a model cannot look."""
_LANGUAGE_FIELDS = ("language", "lang")
_SCRIPTS = {
    "ja": re.compile("[\u3041-\u30fa]"),
    "ko": re.compile("[\u1100-\u11ff\uac00-\ud7a3]"),
    "zh": re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"),
    "ru": re.compile("[\u0400-\u04ff]"),
    "ar": re.compile("[\u0600-\u06ff]"),
}
"""Language -> what characters of it tell. The first that fits counts."""
_OTHERWISE = "en"
_INTEGER = re.compile(r"[+-]?\d+(?:\.0*)?")
_NUMBER = re.compile(r"[+-]?\$?[\d,]*\.?\d+")


@dataclass(frozen=True, slots=True)
class Problem:
    uid: str
    """File and line, or row, counted from 1: dapo-math-17k.parquet:12."""
    text: str
    """Character by character as in the row, without a template around it."""
    answer: str
    source: str
    language: str
    has_image: bool = False
    has_other_turns: bool = False
    """Whether the row has chat messages beside it, such as the system's, which are not taken over."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Where a row keeps what is wanted; dots reach into nested objects. None is looked for."""

    prompt: str | None = None
    answer: str | None = None


def problems_of(source: Source, fields: Fields) -> Iterator[Problem]:
    """Yield the problem of every row, in the order of the files.

    Raises:
        ConfigError: for a file that cannot be read; for a row without one of the fields, or with something else in it
            than a problem or an answer, naming row and field.
    """
    answers = source.known.answers if source.known else Answers.VERBATIM
    for file in source.files:
        found: Fields | None = None
        for uid, row in read_rows(str(file)):
            found = found or _fields(uid, row, Fields() if source.known else fields)
            prompt = value_of(uid, row, found.prompt or "")
            text, has_image = _problem(uid, prompt, found.prompt or "")
            bare = _unwrapped(text)
            if source.known and source.known.wrapped and not isinstance(prompt, str) and bare == text:
                raise ConfigError(
                    f"{uid}: the text in {found.prompt} does not begin and end as that of {source.name} does, so the "
                    f"problem in it cannot be told from what is around it: {text[:80]!r}..."
                )
            if not bare.strip() and not has_image:
                raise ConfigError(f"{uid}: the problem in {found.prompt} is empty")
            yield Problem(
                uid,
                bare,
                answer_of(uid, value_of(uid, row, found.answer or ""), found.answer or "", answers),
                source.name,
                _said_language(uid, row) or _language(bare),
                has_image or any(row.get(field) for field in _IMAGE_FIELDS) or _shows_image(bare),
                has_other_turns=isinstance(prompt, list) and len(prompt) > 1,
            )


def _fields(uid: str, row: Mapping[str, Any], asked: Fields) -> Fields:
    return Fields(
        asked.prompt or _first(uid, row, PROMPT_FIELDS, "problem", "--prompt-field"),
        asked.answer or _first(uid, row, ANSWER_FIELDS, "answer", "--answer-field"),
    )


def _first(uid: str, row: Mapping[str, Any], names: Sequence[str], what: str, option: str) -> str:
    for name in names:
        if _has(row, name):
            return name
    raise ConfigError(
        f"{uid}: no field with the {what}: looked for {', '.join(names)}, and the row has {', '.join(map(str, row))}; "
        f"name it with {option}"
    )


def _has(row: Mapping[str, Any], name: str) -> bool:
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True


def value_of(uid: str, row: Mapping[str, Any], name: str) -> Any:
    """
    Raises:
        ConfigError: where the row has no such field.
    """
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            here = f"has {', '.join(map(str, value))}" if isinstance(value, Mapping) else f"is {type(value).__name__}"
            raise ConfigError(f"{uid}: no field {name!r}: where {part!r} should be, the row {here}")
        value = value[part]
    return value


def _problem(uid: str, value: Any, name: str) -> tuple[str, bool]:
    """Return the text, and whether an image belongs to it. Of chat messages the last of the user counts."""
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, Mapping) and turn.get("role") == "user"]
        if not turns:
            raise ConfigError(f"{uid}: {name} is a list without a chat message of role 'user'")
        value = turns[-1].get("content")
    parts = value if isinstance(value, list) else []
    if parts and all(isinstance(part, Mapping) for part in parts):
        value = "".join(str(part.get("text") or "") for part in parts if part.get("type") == "text")
    if not isinstance(value, str):
        raise ConfigError(f"{uid}: the problem in {name} must be text or a list of chat messages; got {value!r}")
    check_characters(value, f"{uid}: the problem in {name}")
    return value, any(part.get("type") != "text" for part in parts if isinstance(part, Mapping))


def _unwrapped(text: str) -> str:
    for before, after in _AROUND:
        if text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after):
            return text[len(before) : len(text) - len(after)]
    return text


def answer_of(uid: str, value: Any, name: str, answers: Answers) -> str:
    """Return an answer as text, without blanks around it.

    Raises:
        ConfigError: where it is none of the kind that the set has.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if answers is Answers.INTEGERS and isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str) and not value.strip():
        raise ConfigError(f"{uid}: the answer in {name} is empty")
    if not isinstance(value, str):
        hint = '; write 34.0 as 34 or "34.0", whichever it means' if isinstance(value, float) else ""
        raise ConfigError(
            f"{uid}: the answer in {name} must be text or an integer; got {value!r} ({type(value).__name__}){hint}"
        )
    text = value.strip()
    check_characters(text, f"{uid}: the answer in {name}")
    if answers is Answers.INTEGERS:
        if not _INTEGER.fullmatch(text):
            raise ConfigError(f"{uid}: the answer in {name} must be an integer; got {value!r}")
        return text.partition(".")[0]
    if answers is Answers.AFTER_HASHES:
        text = text.rpartition("####")[2].strip()
        if not _NUMBER.fullmatch(text):
            raise ConfigError(f"{uid}: the answer in {name} must end with #### and a number; got ...{value[-40:]!r}")
        return text.replace(",", "").replace("$", "")
    return text


def _said_language(uid: str, row: Mapping[str, Any]) -> str | None:
    for field in _LANGUAGE_FIELDS:
        language = row.get(field)
        if isinstance(language, str) and language.strip():
            check_characters(language, f"{uid}: {field}")
            return language.strip().lower()
    return None


# Published rows come a hundred times over: what only depends on the text is found out once.
@lru_cache(maxsize=1 << 16)
def _shows_image(text: str) -> bool:
    return _IMAGE.search(text) is not None


@lru_cache(maxsize=1 << 16)
def _language(text: str) -> str:
    """What its characters tell; `en` for those that tell nothing."""
    return next((language for language, script in _SCRIPTS.items() if script.search(text)), _OTHERWISE)
