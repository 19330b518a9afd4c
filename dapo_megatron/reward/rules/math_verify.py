r"""The Math-Verify library (0.9) compares symbolically, for answers that are not integers.

Only the stated answer (`statement.final_answer`) is parsed, not the whole response, and none that is longer than
`MAX_CHARACTERS`: that keeps numbers of the reasoning out and most of the input that sympy chokes on. What is left may
still take for ever or all memory, since the library's own time limit is off (it works in main threads only and cancels
other alarms): whoever calls this must be ready to kill the process.
"""

from __future__ import annotations

import logging

from math_verify import LatexExtractionConfig, parse, verify

from dapo_megatron.reward.rules.statement import final_answer

MAX_CHARACTERS = 200

# The library warns, once each, that its time limit is off.
for module in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
    logging.getLogger(module).setLevel(logging.ERROR)


def grade(response: str, answer: str) -> tuple[bool, str | None]:
    """Tell whether Math-Verify finds the stated answer equal to `answer`, and what it parses it as."""
    text = (final_answer(response) or "").strip()
    if not text or len(text) > MAX_CHARACTERS:
        return False, None
    # sympy raises nearly anything on nonsense (RecursionError, MemoryError, TypeError, ...), which is a wrong answer.
    try:
        gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=0)
        target = parse(text, parsing_timeout=0)
        return bool(target) and verify(gold, target, timeout_seconds=0), str(target[-1]) if target else None
    except Exception:
        return False, None


def equal(answer: str, gold: str) -> bool:
    r"""Tell whether two pieces of LaTeX, without delimiters, are the same expression, relation, set or matrix.

    >>> equal(r"\sqrt{8}", r"2\sqrt{2}"), equal("0 < x < 1", "(0, 1)"), equal("1.414214", r"\sqrt{2}")
    (True, True, False)
    """
    if max(len(answer), len(gold)) > MAX_CHARACTERS:
        return False
    latex = [LatexExtractionConfig(boxed_match_priority=-1)]
    try:
        read = [parse(f"${text}$", latex, "no_fallback", parsing_timeout=0) for text in (gold, answer)]
        # To 12 places, because 1.414214 is not the square root of 2.
        return all(read) and verify(*read, float_rounding=12, allow_set_relation_comp=True, timeout_seconds=0)
    except Exception:
        return False
