"""Grades responses that are there already: `dapo-megatron eval --responses FILE`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, StrictStr, TypeAdapter, ValidationError

from dapo_megatron.config import RewardConfig
from dapo_megatron.data.sources import read_rows
from dapo_megatron.errors import ConfigError
from dapo_megatron.eval.record import END, Graded, disagree
from dapo_megatron.eval.report import Told, set_results, table
from dapo_megatron.preflight import check_grading
from dapo_megatron.reward.math import ALWAYS_GRADED
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


_ROW: TypeAdapter[Answered] = TypeAdapter(Answered)


def grade_file(path: Path) -> Told:
    """Grade all responses in a .jsonl (or .parquet) file by the rules that every evaluation has side by side.

    Raises:
        ConfigError: naming row and field, where one is not as it has to be.
    """
    check_grading(*ALWAYS_GRADED)
    answered = read_answered(path)
    grades = {rule: _grade(answered, rule) for rule in ALWAYS_GRADED}
    results = set_results(grades)
    differing = []
    for place, row in enumerate(answered):
        for sample, text in enumerate(row.responses):
            by_rule = {rule: found[place][sample] for rule, found in grades.items()}
            if disagree(by_rule):
                told = {
                    rule: {"correct": found.correct, "extracted": found.extracted} for rule, found in by_rule.items()
                }
                differing.append(
                    {"uid": row.uid, "sample": sample, "answer": row.answer, "grades": told, "text": text[-END:]}
                )
    return Told({"responses": str(path), **results, "differing": differing}, table(path.name, results))


def read_answered(path: Path) -> list[Answered]:
    """
    Raises:
        ConfigError: as `grade_file`.
    """
    found: dict[str, Answered] = {}
    places: list[str] = []
    for place, row in read_rows(str(path)):
        try:
            answered = _ROW.validate_python(_with_text(row))
        except ValidationError as error:
            issue = error.errors()[0]
            field = ".".join(map(str, issue["loc"]))
            here = f"; the row has {', '.join(row) or 'nothing'}" if issue["type"].startswith("missing") else ""
            raise ConfigError(f"{place}: {field}: {issue['msg'].lower()}{here}") from error
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


def _with_text(row: dict[str, object]) -> dict[str, object]:
    """Spell an answer that is an integer as its digits, as data.train does."""
    answer = row.get("answer")
    return {**row, "answer": str(answer)} if isinstance(answer, int) and not isinstance(answer, bool) else row


def _grade(answered: Sequence[Answered], rule: str) -> list[list[Graded]]:
    reward = RewardConfig.model_validate({"rule": rule})
    items = [(text, row.answer) for row in answered for text in row.responses]
    with GradingPool(reward.rule, reward.workers, reward.timeout_seconds) as pool:
        grades = iter(asyncio.run(pool.grade(items)))
    return [[Graded.of(next(grades)) for _ in row.responses] for row in answered]
