"""Compares two evaluations of the same problems, problem by problem."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dapo_megatron.errors import ConfigError
from dapo_megatron.eval.record import RESULTS, SETTINGS, Row, read_rows, read_settings
from dapo_megatron.eval.report import Grades, Told, columns, grades_by_rule, shown
from dapo_megatron.eval.statistics import of_problems, paired
from dapo_megatron.units import counted

_TO_COMPARE = ("problems", "samples", "rules")
"""What has to be the same of each set."""
_COPY_AGAIN = "copy the whole folder again"


def compare_folders(first: Path, second: Path) -> Told:
    """Compare two evaluations of the same problems, by a paired bootstrap over problems.

    Raises:
        ConfigError: where one is none, unfinished or not whole, or problems, samples or rules differ.
    """
    one, two = _settings(first), _settings(second)
    for folder in (first, second):
        if not (folder / RESULTS).is_file():
            raise ConfigError(f"the evaluation in {folder} is not finished ({RESULTS} is missing); start it again")
    same = ["sets", "truncated_is_wrong", *(f"{name}.{key}" for name in one["sets"] for key in _TO_COMPARE)]
    if problems := [f"  {key}: {one.get(key)} and {two.get(key)}" for key in same if one.get(key) != two.get(key)]:
        raise ConfigError(
            f"{first} and {second} cannot be compared problem by problem:\n"
            + "\n".join(problems)
            + "\nevaluate both with the same sets, samples and rules; problems are known by the names of their files, "
            "so one by another name is another set"
        )
    ones, twos = (
        {name: _rows(folder, name, one[f"{name}.samples"]) for name in one["sets"]} for folder in (first, second)
    )
    for name in ones:
        if missing := [uid for uid in ones[name] if uid not in twos[name]]:
            raise ConfigError(
                f"{second / f'{name}.jsonl'} lacks problem {missing[0]}, which {first / f'{name}.jsonl'} has, although "
                f"by their settings both have the same problems; {_COPY_AGAIN}"
            )
    compared = compare(
        {name: [*of_set.values()] for name, of_set in ones.items()},
        {name: [twos[name][uid] for uid in of_set] for name, of_set in ones.items()},
    )
    other = {key: [one.get(key), two.get(key)] for key in {**one, **two} if one.get(key) != two.get(key)}
    lines = [f"first   {first}", f"second  {second}", *(_difference(key, *values) for key, values in other.items())]
    return Told(
        {"first": str(first), "second": str(second), "settings_differ": other, "sets": compared},
        "\n".join([*lines, "", comparison_table(compared)]),
    )


def _difference(key: str, one: Any, two: Any) -> str:
    said = f"{key}: {one} and {two}"
    if not key.endswith(".prompts"):
        return said
    return f"{said}: the models got other tokens, by another template, tokenizer or wording of the questions"


def _settings(folder: Path) -> dict[str, Any]:
    decisive = read_settings(folder).decisive
    sets = decisive.get("sets") or []
    for key in ("sets", *(f"{name}.{key}" for name in sets for key in _TO_COMPARE)):
        if not decisive.get(key):
            raise ConfigError(f"{folder / SETTINGS} is not whole: {key} is missing; {_COPY_AGAIN}")
    return decisive


def _rows(folder: Path, name: str, samples: int) -> dict[str, list[Row]]:
    """Return uid -> its rows, for as many problems as the results are about."""
    path = folder / f"{name}.jsonl"
    try:
        expected = json.loads((folder / RESULTS).read_bytes())["sets"][name]["problems"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / RESULTS} does not say how many problems {name} has; {_COPY_AGAIN}") from error
    if not path.is_file():
        raise ConfigError(f"{path} is missing; {_COPY_AGAIN}")
    rows = read_rows(path, samples)
    if len(rows) != expected:
        raise ConfigError(
            f"{path} has the responses to {counted(len(rows), 'problem')}, and {RESULTS} is about {expected}; "
            f"{_COPY_AGAIN}"
        )
    return rows


def compare(
    first: Mapping[str, Sequence[Sequence[Row]]], second: Mapping[str, Sequence[Sequence[Row]]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compare two evaluations of the same problems.

    Args:
        first, second: set -> its rows [P, K], problems in the same order.

    Returns:
        Set -> rule -> metric -> first, second, difference (second - first) and its interval over problems, paired.
    """
    return {
        name: {
            rule: _compare_rule(ones, grades_by_rule(second[name])[rule])
            for rule, ones in grades_by_rule(first[name]).items()
        }
        for name in first
    }


def _compare_rule(ones: Grades, others: Grades) -> dict[str, Any]:
    one, two = (
        of_problems([[g.extracted for g in row] for row in grades], [[g.correct for g in row] for row in grades])
        for grades in (ones, others)
    )
    compared = {}
    for metric, values_P in one.items():
        difference, interval = paired(values_P, two[metric])
        compared[metric] = {
            "first": float(np.mean(values_P)),
            "second": float(np.mean(two[metric])),
            "difference": difference,
            "over_problems": interval,
        }
    return compared


def comparison_table(compared: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return what `compare` gives for people."""
    lines: list[str] = []
    for name, rules in compared.items():
        for rule, metrics in rules.items():
            rows = [[f"{name}, rule {rule}", "first", "second", "second - first, 95% interval over problems"]]
            for metric, cell in metrics.items():
                difference = f"{cell['difference']:+8.2%}  {shown(cell['over_problems'])}"
                rows.append([metric, f"{cell['first']:7.2%}", f"{cell['second']:7.2%}", difference])
            lines += [*columns(rows), ""]
    return "\n".join(lines).rstrip()
