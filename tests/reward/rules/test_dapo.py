import json
from pathlib import Path

import pytest

from dapo_megatron.reward.math import grade

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = [json.loads(line) for line in (GOLDEN / "reward_cases.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["note"])
def test_agrees_with_the_published_rule(case):
    got = grade(case["response"], case["gold"], "dapo")
    assert got.correct == case["math_dapo"]
    # The published code says [INVALID] for "no label"; a response may also write it as its answer.
    no_label = case["math_dapo_pred"] == "[INVALID]" and "Answer: [INVALID]" not in case["response"]
    assert got.extracted == (None if no_label else case["math_dapo_pred"])


def test_a_missing_answer_equals_no_gold_answer():
    assert not grade("no label here", "[INVALID]", "dapo").correct


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (r"\frac12", "\\frac{1}{2}"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("$34$ or $35$", "34"),
        ("1,234 students", "1234"),
        (r"\mbox{east}", "east"),
        (r"90^{\circ}", "90"),
        ("x=y=-7", "-7"),
    ],
)
def test_normal_forms(text, normal):
    assert grade(f"Answer: {text}", text, "dapo").extracted == normal


def test_only_the_last_300_characters_are_read():
    assert grade("Answer: 34" + " " * 290, "34", "dapo").correct
    assert not grade("Answer: 34" + " " * 291, "34", "dapo").correct
