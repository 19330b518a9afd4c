"""This module grades a response by one of three rules."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Literal

Rule = Literal["dapo", "lenient", "math_verify"]

PACKAGES: dict[Rule, str] = {"lenient": "math_verify", "math_verify": "math_verify"}
"""A rule that is named here imports this package."""

ALWAYS_GRADED: tuple[Rule, ...] = ("dapo", "lenient")
"""By these `dapo-megatron eval` grades every response, side by side: as published, and forgiving of notation."""

WINDOW = 8192
"""No rule reads more than this many characters from the end of a response, so that grading takes bounded time."""


@dataclass(frozen=True, slots=True)
class Grade:
    """A grade is what a rule made of one response.

    >>> grade("We add.\\nAnswer: 34", "34", "dapo")
    Grade(correct=True, extracted='34', timed_out=False)
    """

    correct: bool
    extracted: str | None
    """The answer as the rule reads it, None where it finds none. Untrusted: model output."""
    timed_out: bool = False
    """The worker took too long or died over this response; it counts as wrong."""


def grade(response: str, answer: str, rule: Rule) -> Grade:
    """Grade one response against the gold answer. Never raises on any text.

    `dapo` is the string rule published with DAPO, `lenient` forgives notation (see `rules.lenient`), `math_verify` asks
    the Math-Verify library. The last two have no time limit of their own: run them in a `pool.GradingPool`.
    """
    # Imported on use: math_verify pulls in sympy, which costs half a second.
    correct, extracted = import_module(f"dapo_megatron.reward.rules.{rule}").grade(response[-WINDOW:], answer)
    return Grade(correct, extracted)
