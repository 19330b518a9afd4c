r"""A rule of ours that forgives notation: two answers are equal when they mean the same number, list or text.

Which answer counts: what follows the last label (`Answer:`, `Answer is:`, `**Answer:**`, `<answer>`) on its line or in
its display block; without a label, the last \boxed{}. How it is read:
- delimiters, boxes, fonts, currency, percent and degree signs mean nothing; words after a number are its unit or prose,
  unless they change it (`34 or`, `34 million`);
- arithmetic is evaluated exactly; thousands are separated in threes or not at all;
- in a chain of equations all constant sides must agree (`34 = 2 \cdot 17`); without constants the last side counts;
- sets compare without order; `a < x \le b` is the interval `(a, b]`; everything else compares as text without blanks.
Several answers on one line are a list, hence never equal to a number.
"""

from __future__ import annotations

import re
import string
from collections.abc import Hashable
from fractions import Fraction

from dapo_megatron.reward.rules.expression import NotArithmeticError, evaluate

LABEL = re.compile(r"answer(?:\s+is)?[\s*_]*[:\uff1a][\s*_]*|<answer>\s*", re.IGNORECASE)
DISPLAY = {r"\[": r"\]", "$$": "$$"}
BOX = r"\boxed{"

SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013\ufe63\uff0d", "-"),  # minus, en dash, small and full-width hyphen
        "\uff0b": "+",
        "\uff1d": "=",
        "\uff0c": ",",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
    }
)
MEANINGLESS = re.compile(
    r"<\|[^|<>]*\|>|</?answer>"  # special tokens and tags
    r"|\\left(?![A-Za-z])|\\right(?![A-Za-z])|\\displaystyle(?![A-Za-z])|\\[!,;:]"
    r"|\^\{?\\circ\}?|°|\\?%|\\?\$|\\[()\[\]]|`|(?<![\w)}])\*\*|\*\*(?![\w({])"  # ** is bold, but 2**10 a power
)
BRACES = re.compile(r"(\\(?:boxed|fbox|text|mbox|textbf|textit|mathbf|mathrm|mathit|bm|boldsymbol)\s*\{|\\[{}]|[{}])")

LIST = re.compile(r"(\\\{|[\[(])(.*)(\\\}|[\])])", re.DOTALL)
RELATION = re.compile(r"(\\leq?(?![A-Za-z])|<=?)")
SEVERAL = re.compile(r"[,;]|\b(?:and|or)\b")
PROSE = string.ascii_letters + string.whitespace + ",.;:'\""
UNIT_POWER = re.compile(r"(?<=[A-Za-z])\s*\^\s*(?:[23]|\{[23]\})")
CHANGES_A_NUMBER = {
    *("and", "or", "to", "by", "not", "plus", "minus", "times", "over", "mod", "squared", "cubed", "half"),
    *("dozen", "hundred", "thousand", "million", "billion", "trillion"),
}


def grade(response: str, answer: str) -> tuple[bool, str | None]:
    found = final_answer(response)
    if found is None:
        return False, None
    text = clean(found)
    if not text:
        return False, None
    value = read(text)
    return value == read(clean(answer)), str(value) if isinstance(value, Fraction) else text


def final_answer(response: str) -> str | None:
    """The part of a response that states its answer, as it stands there (a box with its braces); None without one."""
    labels = list(LABEL.finditer(response))
    if not labels:
        return _last_box(response)
    rest = response[labels[-1].end() :]
    start = 0
    if closing := DISPLAY.get(rest[:2]):
        start = max(0, rest.find(closing, 2))
    line_end = rest.find("\n", start)
    return rest if line_end < 0 else rest[:line_end]


def _last_box(response: str) -> str | None:
    start = response.rfind(BOX)
    if start < 0:
        return None
    depth = 0
    for brace in re.finditer(r"(?<!\\)[{}]", response[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return response[start : start + brace.end()]
    return None


def clean(text: str) -> str:
    """`text` without anything that carries no meaning of its own."""
    text = text.translate(SIGNS).replace("{,}", ",")
    text = MEANINGLESS.sub(lambda sign: "" if sign[0] == r"\!" else " ", text)
    out: list[str] = []
    wrapped: list[bool] = []
    for piece in BRACES.split(text):
        if piece.endswith("{") and piece != r"\{":
            wrapped.append(piece != "{")
            out.append(" " if wrapped[-1] else piece)
        elif piece == "}":
            out.append(" " if wrapped and wrapped.pop() else piece)
        else:
            out.append(piece)
    return " ".join("".join(out).split()).rstrip(" ,.;:*_")


def read(text: str) -> Hashable:
    """What a cleaned text means: a Fraction for a number, otherwise something that is equal for equal meanings."""
    if items := _interval(text) or _list(text):
        return items
    *left, last = re.split(r"(?<![!<>])=", text)
    sides = [_number(side, prose=False) for side in left] + [_number(last, prose=True)]
    if any(value is None and SEVERAL.search(side) for side, value in zip(left, sides, strict=False)):
        return _as_text(text)  # x = 3, y = 4
    constants = {value for value in sides if isinstance(value, Fraction)}
    if len(constants) == 1:
        return constants.pop()
    if constants or sides[-1] is None:
        return _as_text(text if constants else last)
    return sides[-1]


def _number(text: str, *, prose: bool) -> Hashable | None:
    """A Fraction for a constant, some other value for an expression with variables, None for anything else."""
    try:
        value, constant = evaluate(text)
    except NotArithmeticError:
        if not prose:
            return None
        text = UNIT_POWER.sub("", text)
        number = text.rstrip(PROSE)
        changed = CHANGES_A_NUMBER.intersection(re.findall("[a-z]+", text[len(number) :].lower()))
        return None if changed or number == text else _number(number, prose=False)
    return value if constant else ("expression", value)


def _list(text: str) -> Hashable | None:
    """The items of a bracketed list of two or more."""
    match = LIST.fullmatch(text)
    if not match:
        return None
    items, depth, start, (opening, inner, closing) = [], 0, 0, match.groups()
    for sign in re.finditer(r"[(\[{,}\])]", inner):
        depth += {"(": 1, "[": 1, "{": 1, ",": 0}.get(sign[0], -1)
        if depth < 0:
            return None
        if sign[0] == "," and depth == 0:
            items.append(_item(inner[start : sign.start()]))
            start = sign.end()
    if not items or depth:
        return None
    items.append(_item(inner[start:]))
    return opening, frozenset(items) if opening == r"\{" else tuple(items), closing


def _interval(text: str) -> Hashable | None:
    """`a < x \\le b`, read as the list `(a, b]`."""
    match RELATION.split(text):
        case [low, first, name, second, high] if re.fullmatch(r"\s*[A-Za-z]\s*", name):
            return "(" if first == "<" else "[", (_item(low), _item(high)), ")" if second == "<" else "]"
    return None


def _item(text: str) -> Hashable:
    value = _number(text, prose=False)
    return _as_text(text) if value is None else value


def _as_text(text: str) -> str:
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac ?([0-9]) ?([0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt ?([0-9A-Za-z])", r"\\sqrt{\1}", text)
    return "".join(text.split())
