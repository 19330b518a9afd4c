"""What is told of graded responses: results for programs, and a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from dapo_megatron.eval.record import Graded, Row
from dapo_megatron.eval.statistics import (
    interval_of_mean,
    interval_over_both,
    interval_over_samples,
    of_problems,
    quantiles,
)
from dapo_megatron.units import counted


@dataclass(frozen=True, slots=True)
class Told:
    """What a command has to say."""

    results: dict[str, Any]
    """For programs: plain values."""
    table: str
    """For people. Untrusted where names of files and problems are."""


Grades = Sequence[Sequence[Graded]]
"""[P, K]: of each problem, what a rule made of its responses."""

_OTHER_INTERVALS = {"over_problems_and_samples": "problems and samples", "over_samples": "samples"}


def rule_results(grades_PK: Grades) -> dict[str, Any]:
    """Return each metric with its intervals, and how often the rule had no answer, or no time."""
    correct_PK = [[grade.correct for grade in row] for row in grades_PK]
    extracted_PK = [[grade.extracted for grade in row] for row in grades_PK]
    metrics: dict[str, dict[str, Any]] = {
        name: {"value": float(np.mean(values_P)), "over_problems": interval_of_mean(values_P)}
        for name, values_P in of_problems(extracted_PK, correct_PK).items()
    }
    if (samples := len(correct_PK[0])) > 1:
        metrics[f"avg@{samples}"] |= {
            "over_problems_and_samples": interval_over_both(correct_PK),
            "over_samples": interval_over_samples(correct_PK),
        }
    return {
        "metrics": metrics,
        "no_answer": float(np.mean([grade.extracted is None for row in grades_PK for grade in row])),
        "timed_out": sum(grade.timed_out for row in grades_PK for grade in row),
    }


def set_results(grades: Mapping[str, Grades], rows_PK: Sequence[Sequence[Row]] | None = None) -> dict[str, Any]:
    """Return the results of a set of prompts.

    Args:
        grades: rule -> what it made of the responses, problem by problem.
        rows_PK: the responses; None where there are only texts.
    """
    first = next(iter(grades.values()))
    found: dict[str, Any] = {
        "problems": len(first),
        "samples": len(first[0]),
        "rules": {rule: rule_results(grades_PK) for rule, grades_PK in grades.items()},
        "differ": {
            f"{one} and {other}": _differing(one, grades[one], other, grades[other])
            for one, other in combinations(grades, 2)
        },
    }
    if rows_PK:
        lengths = [row.length for rows in rows_PK for row in rows]
        found["length"] = {"mean": float(np.mean(lengths)), "quantiles": quantiles(lengths)}
        found["truncated"] = float(np.mean([row.truncated for rows in rows_PK for row in rows]))
    return found


def _differing(one: str, ones: Grades, other: str, others: Grades) -> dict[str, int]:
    pairs = [
        (a.correct, b.correct) for row, rows in zip(ones, others, strict=True) for a, b in zip(row, rows, strict=True)
    ]
    return {f"only {one}": pairs.count((True, False)), f"only {other}": pairs.count((False, True))}


def grades_by_rule(rows_PK: Sequence[Sequence[Row]]) -> dict[str, Grades]:
    """Return rule -> grades [P, K]."""
    return {rule: [[row.grades[rule] for row in rows] for rows in rows_PK] for rule in rows_PK[0][0].grades}


def table(name: str, found: Mapping[str, Any]) -> str:
    """Return the results of a set (`set_results`, with `temperature` and `top_p` where it was sampled) for people."""
    how = f", temperature {found['temperature']:g}, top-p {found['top_p']:g}" if "top_p" in found else ""
    lines = [f"{name}: {counted(found['problems'], 'problem')} x {counted(found['samples'], 'response')}{how}"]
    if "length" in found:
        at = found["length"]["quantiles"]
        lines.append(
            f"  length {found['length']['mean']:,.1f} tokens in the mean; shortest {at['0.0']:,.0f}, 5% "
            f"{at['0.05']:,.0f}, median {at['0.5']:,.0f}, 95% {at['0.95']:,.0f}, longest {at['1.0']:,.0f}; "
            f"{found['truncated']:.1%} truncated"
        )
    rules = found["rules"]
    rows = [["", *(f"rule {rule}, 95% interval over problems" for rule in rules)]]
    for metric, whole in next(iter(rules.values()))["metrics"].items():
        cells = [results["metrics"][metric] for results in rules.values()]
        rows.append([metric, *(f"{cell['value']:7.2%}  {shown(cell['over_problems'])}" for cell in cells)])
        for key, words in _OTHER_INTERVALS.items():
            if whole.get(key):
                rows.append([f"  over {words}", *(f"{'':7}  {shown(cell[key])}" for cell in cells)])
    rows.append(["no answer", *(f"{results['no_answer']:7.2%}" for results in rules.values())])
    if any(results["timed_out"] for results in rules.values()):
        rows.append(["timed out", *(f"{results['timed_out']:7d}" for results in rules.values())])
    lines += columns(rows)
    for between, counts in found["differ"].items():
        lines.append(f"  {between} differ: " + ", ".join(f"right by {who} {count:,}" for who, count in counts.items()))
    return "\n".join(lines)


def shown(ends: tuple[float, float]) -> str:
    """Return an interval for people."""
    return f"({ends[0]:.2%} to {ends[1]:.2%})"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines, cells beneath one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
