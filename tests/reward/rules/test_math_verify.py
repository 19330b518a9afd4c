import asyncio
import json
from pathlib import Path

import pytest

from dapo_megatron.reward.math import Grade, grade
from dapo_megatron.reward.pool import GradingPool

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = [json.loads(line) for line in (GOLDEN / "reward_cases.jsonl").read_text().splitlines()]

# The golden column is the library reading the whole response. Reading only the stated answer differs here, each time
# towards common sense: no stray number, no first number of two, no box before a later Answer line, any colon or minus.
READ_OTHERWISE = {
    "two answers on one line",
    "truncated mid sentence; number near the end",
    "hedged",
    "box and line disagree, box right",
    "full-width colon",
    "unicode minus",
}


def test_agrees_with_the_library_on_the_whole_response():
    with GradingPool("math_verify", workers=2, timeout_seconds=2.0) as pool:
        grades = asyncio.run(pool.grade([(case["response"], case["gold"]) for case in CASES]))
    different = {
        case["note"]: (got.correct, case["expected_by_common_sense"])
        for case, got in zip(CASES, grades, strict=True)
        if got.correct != case["math_verify"]
    }
    assert different.keys() == READ_OTHERWISE
    assert all(got == sensible for got, sensible in different.values())


@pytest.mark.parametrize(
    ("response", "gold", "correct"),
    [
        (r"So \boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}", True),
        (r"Answer: $\frac{x^2-1}{x-1}$", "x+1", True),
        (r"Answer: $\sqrt{8}$", r"2\sqrt{2}", True),
        (r"Answer: $\sqrt{8}$", r"3\sqrt{2}", False),
    ],
)
def test_compares_symbolically(response, gold, correct):
    assert grade(response, gold, "math_verify").correct == correct


@pytest.mark.parametrize(
    "text", ["", "\\", "$}{$", r"\boxed{", "\x00", "\ud800", "$" + "(" * 190, "Answer: $\\frac{}{}$"]
)
def test_never_raises(text):
    assert not grade(text, "34", "math_verify").correct
    assert not grade("Answer: 34", text, "math_verify").correct


def test_long_answers_are_not_parsed():
    ones = "+".join(["1"] * 101)
    assert grade(f"Answer: {ones[:-2]}", "100", "math_verify").correct
    assert grade(f"Answer: {ones}", "101", "math_verify") == Grade(correct=False, extracted=None)
