"""Compares two evaluations of the same problems, problem by problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dapo_megatron.errors import ConfigError
from dapo_megatron.eval.record import RESULTS, Row, read_rows, read_settings
from dapo_megatron.eval.report import Grades, Told, columns, grades_by_rule, shown
from dapo_megatron.eval.statistics import of_problems, paired

_TO_COMPARE = ("problems", "samples", "rules")
"""What has to be the same of each set."""


def compare_folders(first: Path, second: Path) -> Told:
    """Compare two evaluations of the same problems, by a paired bootstrap over problems.

    Raises:
        ConfigError: where one is none or unfinished, or problems, samples or rules differ.
    """
    one, two = read_settings(first).decisive, read_settings(second).decisive
    for folder in (first, second):
        if not (folder / RESULTS).is_file():
            raise ConfigError(f"the evaluation in {folder} is not finished ({RESULTS} is missing); start it again")
    same = ["sets", "truncated_is_wrong", *(f"{name}.{key}" for name in one["sets"] for key in _TO_COMPARE)]
    if problems := [f"  {key}: {one.get(key)} and {two.get(key)}" for key in same if one.get(key) != two.get(key)]:
        raise ConfigError(
            f"{first} and {second} cannot be compared problem by problem:\n"
            + "\n".join(problems)
            + "\nevaluate both with the same sets, samples and rules"
        )
    rows = [
        {name: [*read_rows(folder / f"{name}.jsonl", one[f"{name}.samples"]).values()] for name in one["sets"]}
        for folder in (first, second)
    ]
    compared = compare(*rows)
    other = {
        key: [one.get(key), two.get(key)]
        for key in {**one, **two}
        if one.get(key) != two.get(key) and not key.endswith(".prompts")
    }
    lines = [f"first   {first}", f"second  {second}", *(f"{key}: {a} and {b}" for key, (a, b) in other.items())]
    return Told(
        {"first": str(first), "second": str(second), "settings_differ": other, "sets": compared},
        "\n".join([*lines, "", comparison_table(compared)]),
    )


def compare(
    first: Mapping[str, Sequence[Sequence[Row]]], second: Mapping[str, Sequence[Sequence[Row]]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compare two evaluations of the same problems.

    Args:
        first, second: set -> its rows [P, K].

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
