"""Exact value of short arithmetic in plain text or LaTeX, in linear time and with numbers of bounded size."""

from __future__ import annotations

import operator
import random
import re
from fractions import Fraction

MAX_BITS = 2048
"""Numerators and denominators never grow beyond this: a tower of powers has no value here."""

TOKEN = re.compile(
    r"""\s*(?:
    (?P<number>
        [0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9,])     # 1,234.5
      | [0-9]{1,3}(?:\ [0-9]{3})+(?!\ ?[0-9])               # 1 234
      | (?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?
    )
    | (?P<variable>\\pi(?![A-Za-z])|(?<![A-Za-z\\])[A-Za-z](?![A-Za-z]))
    | (?P<power>\^|\*\*) | (?P<times>[*\u00d7\u00b7]|\\(?:cdot|times)(?![A-Za-z]))
    | (?P<divide>[/\u00f7]|\\div(?![A-Za-z]))
    | (?P<plus>\+) | (?P<minus>-) | (?P<open>[({]) | (?P<close>[)}])
    )\s*""",
    re.VERBOSE,
)
MIXED_NUMBER = re.compile(r"[0-9]\s*\\[dt]?frac")
SHORT_FRACTION = re.compile(r"\\[dt]?frac ?([0-9]) ?([0-9])")
BRACES = re.compile(r"(\\[dt]?frac\s*\{|\}\s*\{|[{}])")

BINDS = {"plus": 1, "minus": 1, "times": 2, "divide": 2, "negate": 3, "power": 4}
CLOSES = {"(": ")", "{": "}"}


class NotArithmeticError(ValueError):
    """Not an expression that this module evaluates, or one whose value is too large."""


def evaluate(text: str) -> tuple[Fraction, bool]:
    """The value of `text`, and whether it is a constant.

    A variable stands for a fixed random 64-bit number. So two expressions of equal value are equal as rational
    functions, but for a chance of about 1e-18 (Schwartz-Zippel).

    Raises:
        NotArithmeticError: for anything but numbers, one-letter variables, + - * / ^, fractions and brackets.
    """
    if MIXED_NUMBER.search(text):  # 2\frac{1}{2} is a product to some and a sum to others
        raise NotArithmeticError(text)
    text = _without_fractions(SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text))
    values: list[Fraction] = []
    waiting: list[str] = []  # operators, and open brackets as themselves
    after_operand, constant, position = False, True, 0
    while position < len(text):
        match = TOKEN.match(text, position)
        if not match:
            raise NotArithmeticError(text)
        kind, token = str(match.lastgroup), match[str(match.lastgroup)]
        position = match.end()
        if kind in ("number", "variable", "open"):
            if after_operand and kind == "number":  # 3 4 is not a product; 2x and 3(4) are
                raise NotArithmeticError(text)
            if after_operand:
                _wait("times", waiting, values)
            if kind == "open":
                waiting.append(token)
            else:
                values.append(_number(token) if kind == "number" else _variable(token))
                constant &= kind == "number"
            after_operand = kind != "open"
        elif after_operand and kind == "close":
            while waiting and waiting[-1] in BINDS:
                _apply(waiting.pop(), values)
            if not waiting or CLOSES[waiting.pop()] != token:
                raise NotArithmeticError(text)
        elif after_operand:
            _wait(kind, waiting, values)
            after_operand = False
        elif kind == "minus":
            waiting.append("negate")
        elif kind != "plus":
            raise NotArithmeticError(text)
    if not after_operand or not BINDS.keys() >= set(waiting):
        raise NotArithmeticError(text)
    while waiting:
        _apply(waiting.pop(), values)
    return values[0], constant


def _without_fractions(text: str) -> str:
    r"""`\frac{A}{B}` as `((A)/(B))`."""
    out: list[str] = []
    open_groups: list[str] = []
    for piece in BRACES.split(text):
        match piece[:1], piece[-1:], open_groups[-1:]:
            case "\\", "{", _:
                open_groups.append("numerator")
                out.append("((")
            case "}", "{", ["numerator"]:
                open_groups[-1] = "denominator"
                out.append(")/(")
            case "}", "}", ["denominator"]:
                open_groups.pop()
                out.append("))")
            case "}", "}", [_, *_]:
                open_groups.pop()
                out.append("}")
            case "{", _, _:
                open_groups.append("group")
                out.append("{")
            case _:
                out.append(piece)
    return "".join(out)


def _wait(kind: str, waiting: list[str], values: list[Fraction]) -> None:
    """Let a binary operator wait for its right side, once those before it that bind as tightly are done."""
    while kind != "power" and waiting and BINDS.get(waiting[-1], 0) >= BINDS[kind]:
        _apply(waiting.pop(), values)
    waiting.append(kind)


def _apply(kind: str, values: list[Fraction]) -> None:
    right = values.pop()
    if kind == "negate":
        values.append(-right)
        return
    left = values.pop()
    if kind == "power":
        too_large = abs(right.numerator) * _bits(left) > MAX_BITS
        if right.denominator != 1 or too_large or (left == 0 and right < 0):
            raise NotArithmeticError(f"{left}^{right}")
        values.append(left ** int(right))
        return
    if kind == "divide" and right == 0:
        raise NotArithmeticError(f"{left}/0")
    operations = {"plus": operator.add, "minus": operator.sub, "times": operator.mul, "divide": operator.truediv}
    values.append(_bounded(operations[kind](left, right)))


def _number(token: str) -> Fraction:
    if len(token) > MAX_BITS // 4:
        raise NotArithmeticError(token)
    return _bounded(Fraction(token.replace(",", "").replace(" ", "")))


def _variable(name: str) -> Fraction:
    return Fraction(random.Random(name).getrandbits(64))


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise NotArithmeticError(f"more than {MAX_BITS} bits")
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())
