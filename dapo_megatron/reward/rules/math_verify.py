r"""Symbolic comparison by the Math-Verify library (0.9), for answers that are not integers.

Only the stated answer (`lenient.final_answer`) is parsed, not the whole response, and none that is longer than
`MAX_CHARACTERS`: that keeps numbers of the reasoning out and most of the input that sympy chokes on. What is left may
still take for ever or all memory, since the library's own time limit is off (it works in main threads only and cancels
other alarms): whoever calls this must be ready to kill the process.
"""

from __future__ import annotations

import logging

from math_verify import parse, verify

from dapo_megatron.reward.rules.lenient import final_answer

MAX_CHARACTERS = 200

# The library warns, once each, that its time limit is off.
for module in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
    logging.getLogger(module).setLevel(logging.ERROR)


def grade(response: str, answer: str) -> tuple[bool, str | None]:
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
