"""Grades responses that are there already: `dapo-megatron eval --responses FILE`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, get_args

from pydantic import Field, StrictBool, StrictStr, TypeAdapter, ValidationError

from dapo_megatron.config import RewardConfig
from dapo_megatron.data.sources import read_rows
from dapo_megatron.errors import ConfigError
from dapo_megatron.eval.record import END, Graded
from dapo_megatron.eval.report import Grades, Told, columns, set_results, table
from dapo_megatron.preflight import check_grading
from dapo_megatron.prepare.rows import answer_of
from dapo_megatron.prepare.sets import Answers
from dapo_megatron.reward.math import Rule
from dapo_megatron.reward.pool import GradingPool

_Text = Annotated[StrictStr, Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Answered:
    """A problem with responses to it, as a row of the file."""

    uid: _Text
    answer: _Text
    """The gold answer."""
    responses: Annotated[list[StrictStr], Field(min_length=1)]
    """Untrusted: model output."""
    labels: list[StrictBool] | None = None
    """Which responses are right, where somebody has said so: rules are compared with it."""


_ROW: TypeAdapter[Answered] = TypeAdapter(Answered)


def grade_file(path: Path) -> Told:
    """Grade all responses in a .jsonl (or .parquet) file by every rule.

    Raises:
        ConfigError: naming row and field, where one is not as it has to be.
    """
    rules: tuple[Rule, ...] = get_args(Rule)
    check_grading(*rules)
    answered = read_answered(path)
    grades = {rule: _grade(answered, rule) for rule in rules}
    results = set_results(grades)
    told = [table(path.name, results)]
    if any(row.labels for row in answered):
        results["against_labels"] = {rule: _against_labels(answered, found) for rule, found in grades.items()}
        told += _columns_against(results["against_labels"])
    differing = [
        {
            "uid": row.uid,
            "sample": sample,
            "answer": row.answer,
            "label": label,
            "grades": {
                rule: {"correct": found.correct, "extracted": found.extracted} for rule, found in by_rule.items()
            },
            "text": row.responses[sample][-END:],
        }
        for row, sample, label, by_rule in _each(answered, grades)
        if len({found.correct for found in by_rule.values()} | ({label} - {None})) > 1
    ]
    return Told({"responses": str(path), **results, "differing": differing}, "\n".join(told))


def _each(
    answered: Sequence[Answered], grades: Mapping[str, Grades]
) -> Iterator[tuple[Answered, int, bool | None, dict[str, Graded]]]:
    """Yield problem, place of the response, its label and rule -> grade, for every response."""
    for place, row in enumerate(answered):
        for sample in range(len(row.responses)):
            label = row.labels[sample] if row.labels else None
            yield row, sample, label, {rule: found[place][sample] for rule, found in grades.items()}


def _against_labels(answered: Sequence[Answered], grades: Grades) -> dict[str, int]:
    pairs = [(label, found["rule"].correct) for *_, label, found in _each(answered, {"rule": grades})]
    return {
        "right": pairs.count((True, True)) + pairs.count((False, False)),
        "accepted_wrongly": pairs.count((False, True)),
        "rejected_wrongly": pairs.count((True, False)),
    }


def _columns_against(rules: Mapping[str, Mapping[str, int]]) -> list[str]:
    rows = [["against the labels", "agree", "accepts, labelled wrong", "rejects, labelled right"]]
    rows += [
        [f"rule {rule}", f"{found['right']:,}", f"{found['accepted_wrongly']:,}", f"{found['rejected_wrongly']:,}"]
        for rule, found in rules.items()
    ]
    return columns(rows)


_WORDS = {
    "too_short": "there is none; give one at least",
    "string_too_short": "is empty",
    "string_unicode": "has half a character",
    "list_type": "must be a list",
    "string_type": "must be text",
    "bool_type": "must be true or false",
}
"""Kind of pydantic's errors -> in other words."""


def read_answered(path: Path) -> list[Answered]:
    """
    Raises:
        ConfigError: as `grade_file`.
    """
    found: dict[str, Answered] = {}
    places: list[str] = []
    for place, row in read_rows(str(path)):
        try:
            answered = _ROW.validate_python(_with_text(place, row))
        except ValidationError as error:
            issue = error.errors()[0]
            field = ".".join(map(str, issue["loc"]))
            here = f"; the row has {', '.join(row) or 'nothing'}" if issue["type"].startswith("missing") else ""
            said = _WORDS.get(issue["type"], issue["msg"].lower())
            raise ConfigError(f"{place}: {field}: {said}{here}") from error
        if answered.labels is None and (meant := get_close_matches("labels", row, 1, 0.8)):
            raise ConfigError(f"{place}: {meant[0]}: is labels meant, a list with true or false for each response?")
        if answered.labels is not None and len(answered.labels) != len(answered.responses):
            raise ConfigError(f"{place}: labels: {len(answered.labels)} for {len(answered.responses)} responses")
        if answered.uid in found:
            raise ConfigError(
                f"{place}: uid: {answered.uid!r} is there already; one row has all responses to a problem"
            )
        found[answered.uid] = answered
        places.append(place)
        first = next(iter(found.values()))
        if len(answered.responses) != len(first.responses):
            raise ConfigError(
                f"{place}: responses: {len(answered.responses)} of them, and {places[0]} has {len(first.responses)}; "
                f"avg@k, pass@k and maj@k want as many for every problem"
            )
    return list(found.values())


def _with_text(place: str, row: dict[str, object]) -> dict[str, object]:
    """Spell a uid and an answer that are integers as their digits, and an answer without blanks around it."""
    texts = {}
    if isinstance(uid := row.get("uid"), int) and not isinstance(uid, bool):
        texts["uid"] = str(uid)
    if "answer" in row:
        texts["answer"] = answer_of(place, row["answer"], "answer", Answers.VERBATIM)
    return {**row, **texts}


def _grade(answered: Sequence[Answered], rule: Rule) -> list[list[Graded]]:
    reward = RewardConfig.model_validate({"rule": rule})
    items = [(text, row.answer) for row in answered for text in row.responses]
    with GradingPool(reward.rule, reward.workers, reward.timeout_seconds) as pool:
        grades = iter(asyncio.run(pool.grade(items)))
    return [[Graded.of(next(grades)) for _ in row.responses] for row in answered]
