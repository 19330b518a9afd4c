r"""This rule of ours forgives notation: two answers are equal when they mean the same.

`statement` finds what the response states. Of that the value counts: the first stretch of mathematics, or the only one
of a sentence (`There are 34 apples`), or the one after its last verb (`With 2 boxes, the total is 34`). Read so:
- delimiters, boxes, fonts, currency, percent and degree signs mean nothing; words after a value are its unit or a
  remark, unless they change it (`34 million`), offer another (`34 apples or 35`) or take it back (`34. Wait, no`);
- in a chain of equations all constant sides must agree (`34 = 2 \cdot 17`); without constants the last side counts;
- `1, 2`, `2 and 1`, `x = 1 or x = 2` and `\{1, 2\}` are the same collection, and equal to no number;
- numbers are compared exactly, words as text, anything else by `math_verify.equal`, which may take for ever.
"""

from __future__ import annotations

import re
from fractions import Fraction

from dapo_megatron.reward.rules.math_verify import MAX_CHARACTERS, equal
from dapo_megatron.reward.rules.statement import AND, IS, JUST, final_answer, spelled_out

MEANINGLESS = re.compile(
    r"<\|[^|<>]*\|>|</?answer>"  # special tokens and tags
    r"|\\(?:left|right|displaystyle|q?quad)(?![A-Za-z])|(?<!\\)\\[!,;: ()\[\]]|~|`|\""
    r"|\^(?:\\circ(?![A-Za-z])|\{\\circ\})|\\?%|\\?\$|[€£¥₹]"
    r"|(?<![\w)}])\*\*|\*\*(?![\w({])"  # ** is bold, but 2**10 a power
)
FONT = r"\\(?:boxed|fbox|text|mbox|textbf|textit|textrm|mathbf|mathrm|mathit|bm|boldsymbol)\s*\{"
BRACES = re.compile(rf"({FONT}|\\[{{}}]|[{{}}])")
UNIT_LETTER = re.compile(rf"(?<=\d)\s*{FONT}[\s~]*[A-Za-z][\s.]*\}}")
FUNCTION = re.compile(r"(?<![\\A-Za-z])(sqrt|pi|infty|theta|sin|cos|tan|log|ln)(?![A-Za-z])")
ROOT = re.compile(r"\\sqrt ?(?:([0-9]{2,})|\(([^()]*)\))")

SHORT_WORDS = (
    "am|an|as|at|be|by|cc|cm|dm|do|en|es|et|ft|go|he|hr|if|in|is|it|kg|km|la|lb|le|mg|mi|ml|mm|ms|my|no|of|on|or|oz|pm|rs"
    "|so|to|un|up|us|we|yd"
)
WORD = re.compile(
    r"\\(?:begin|end|operatorname)\s*\{[^{}\s]*\}|\\[A-Za-z]+"
    rf"|(?:{AND})(?=\s*(?:[-+.]?\s*[\d\\(\[{{]|[A-Za-z](?![A-Za-z])))"
    rf"|(?P<word>(?:(?<![A-Za-z])(?:(?i:{SHORT_WORDS})|[kM]?(?:Hz|Pa)|k[JNWV]|Nm|cu|sq|i\.e\.|I(?=[\s'])|a(?=\s+[A-Za-z]{{2}}))(?![A-Za-z])"
    r"|[A-Za-z]{3,}|[A-Za-z]*[^\W\d_A-Za-z]+[^\W\d_]*)(?:'[a-z]+)?|\u2014)"
)
"""Prose, as group `word`. Two letters are a product, but for those listed; an "and" between values is mathematics."""

STRAY = re.compile(r"^(?:[\s,;:)=]|\.(?!\d))+")
VERB = re.compile(rf"(?:{IS}){JUST}\s*$", re.IGNORECASE)
REMARK = re.compile(
    r"[,;!?(\u2014]|\.(?=\s|$)|\s-+\s"
    r"|\b(?:since|because|as|so|which|where|when|for|from|out|of|in|if|that|is|are|per|after)\b"
)
UNIT_POWER = re.compile(r"(?<=[A-Za-z])\s*\^\s*(?:[23]|\{[23]\})")
CHANGED = re.compile(
    rf"[\d=]|^\s*(?:{AND})|\b(?:at least|at most|to|by|not|plus|minus|times|over|mod|squared|cubed|half|dozen|hundred"
    r"|thousand|million|billion)\b|[万亿千百]|[-+/^]\s*$"
)
TAKEN_BACK = re.compile(
    rf"^\W*(?:{AND}|but)\W*\d|^\W*\?|\b(?:is|are|was) not\b|n't\b|不对|更正"
    r"|\b(?:wait|actually|rather|sorry|oops|correction|instead|incorrect|wrong|false|maybe|perhaps|possibl[ye])\b",
    re.IGNORECASE,
)
UNSURE = re.compile(
    r"\b(?:not|no|never|cannot|less|more|fewer|greater|least|most|than|between|if|unless|either|or|maybe|perhaps"
    r"|possibl[ye]|but|unknown|one of|almost|nearly|under|over|except|below|above|half|twice|double|times|minus|plus"
    r"|multiple|divisible)\b|n't\b|[不少多]|[大小]于",
    re.IGNORECASE,
)

CHOICE = re.compile(r"\(?([A-J])\s?[).:]\s*(?!and\b|or\b|,)(\S.*)")
LETTER = re.compile(r"\(?[A-J]\)?")
TIME = re.compile(r"\d\s?:\s?\d")
BRACKET = re.compile(r"\\[{}]|[(\[{}\])]")
SEPARATOR = re.compile(rf"{BRACKET.pattern}|,(?!\d{{3}}(?!\d))|;|{AND}")
RESTATED = re.compile(r"([^(]+) \(=?(.+)\)")  # 34 (17*2)
EQUALS = re.compile(r"(?<![!<>\\])=")
NAMED = re.compile(r"\s*([A-Za-z](?:_[A-Za-z]|\([A-Za-z]\))?)(?:_?\d|_\{\d\})?\s*(?:=|\\in(?![A-Za-z]))\s*([^=]+)")
ONE_LETTER_UNIT = re.compile(r"(?<=\d) [mgshLNJWVKCF](?:\^[23])?(?: ?/ ?[a-z](?:\^[23])?)?$")
NUMBER = re.compile(
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]*)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]{1,3}|/[0-9]+)?"
)
FRACTION = re.compile(r"\\frac\{(-?)([0-9]+)\}\{([0-9]+)\}")
MIXED_NUMBER = re.compile(r"(?<![\d.])(\d+) (\d+)/(\d+)(?![\d.])")
MAX_DIGITS = 1000
SIDE_BY_SIDE, BASE = re.compile(r"(?<![_\d])\d+ \d"), re.compile(r"\d_")


def grade(response: str, answer: str) -> tuple[bool, str | None]:
    """Tell whether the stated answer means the same as `answer`, and what it is (numbers in lowest terms)."""
    text, gold = clean(final_answer(response) or ""), clean(answer)
    if not text:
        return False, None
    word = WORD.match(gold)
    expected = None if word and word["word"] else value(gold)
    if expected is None:
        ends = [] if TAKEN_BACK.search(text) else [mark.start() for mark in REMARK.finditer(text[: len(gold) + 40])]
        return bool(gold) and plain(gold) in [plain(text[:end]) for end in (*ends, len(text))], text
    if (choice := CHOICE.fullmatch(text)) and text != gold:
        text = choice[1 if LETTER.fullmatch(gold) else 2]
    found = value(text)
    if found is None:
        return False, text
    number = _number(found)
    return same(found, expected), found if number is None else str(number)


def clean(text: str) -> str:
    """Strip `text` of what carries no meaning of its own; nothing is left of it where a brace is not closed."""
    text = UNIT_LETTER.sub(" units", spelled_out(text).replace("{,}", ","))
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
    text = " ".join("".join(out).split()).rstrip(" ,.;:*_").replace("**", "^")
    return "" if wrapped else ROOT.sub(r"\\sqrt{\1\2}", FUNCTION.sub(r"\\\1 ", text))


def value(text: str) -> str | None:
    """Return the value that a cleaned statement gives; None where it gives none, or no certain one.

    >>> value("34 (since 17*2)"), value("With 2 boxes, the total is 34 cm^2"), value("34 or thirty-five")
    ('34', '34', None)
    """
    stretches: list[tuple[int, int, bool]] = []  # of mathematics: from, to, and whether a verb stands before it
    start = 0
    for word_start, word_end in [word.span() for word in WORD.finditer(text) if word["word"]] + [(len(text), 0)]:
        if re.search(r"[^\W_]", text[start:word_start]):
            stretches.append((start, word_start, VERB.search(text[max(0, start - 60) : start]) is not None))
        start = word_end
    if not stretches or TIME.search(text):
        return None
    start, end, _ = stretches[0]
    if re.search(r"\w", text[:start]):
        if len(stretches) > 1:
            start, end, after_verb = max(stretches, key=lambda stretch: (stretch[2], stretch[0]))
            if not after_verb:
                return None
        if UNSURE.search(text[:start]):
            return None
    stretch = STRAY.sub("", text[start:end])
    trimmed = re.match(r".*[\w)\]}!|']", _balanced(stretch))
    found = trimmed[0] if trimmed else ""
    unit, remark = stretch[len(found) :] + text[end:], ""
    if boundary := REMARK.search(unit):
        unit, remark = unit[: boundary.start()], unit[boundary.start() :]
    return None if not found or CHANGED.search(UNIT_POWER.sub("", unit)) or TAKEN_BACK.search(remark) else found


def same(answer: str, gold: str) -> bool:
    r"""Tell whether two values are equal.

    >>> same("x = 2 or x = 1", r"\{1, 2\}"), same(r"2 \sqrt{3}", r"\sqrt{12}"), same("(1, 2)", "(2, 1)")
    (True, True, False)
    """
    number = _number(gold)
    given = _number(answer if number is None else ONE_LETTER_UNIT.sub("", answer))
    if number is not None and given is not None:
        return number == given
    if plain(answer) == plain(gold):
        return True
    if max(len(answer), len(gold)) > MAX_CHARACTERS:
        return False
    brackets, items = _items(answer)
    gold_brackets, gold_items = _items(gold)
    if items and gold_items:
        if {brackets, gold_brackets} <= {"", "{}"}:
            return _same_collection(items, gold_items)
        return brackets == gold_brackets and len(items) == len(gold_items) and all(map(same, items, gold_items))
    if items and not brackets:
        return all(same(item, gold) for item in items)
    if (restated := RESTATED.fullmatch(answer)) and all(same(part, gold) for part in restated.groups()):
        return True
    if r"\approx" in answer:
        return any(same(side, gold) for side in answer.split(r"\approx"))
    sides = EQUALS.split(answer)
    if len(sides) > 1 and not EQUALS.search(gold):
        constants = [side for side in sides if not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", side))]
        return all(same(side, gold) for side in constants or sides[-1:])
    if len(sides) == 1 and (named := NAMED.fullmatch(gold)):
        return same(answer, named[2])
    if named := NAMED.fullmatch(answer) if not EQUALS.search(gold) else None:  # x in a set
        return same(named[2], gold)
    answer, gold = _latex(answer), _latex(gold)
    # Math-Verify adds numbers side by side, and drops the base of 40_9.
    return not SIDE_BY_SIDE.search(answer) and not (BASE.search(answer) and BASE.search(gold)) and equal(answer, gold)


def plain(text: str) -> str:
    """Return the form in which two values are the same text."""
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac ?([0-9]) ?([0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt ?([0-9A-Za-z])", r"\\sqrt{\1}", text)
    if "\\" not in text and re.search("[A-Za-z]{2}", text.replace(".", "")):
        return re.sub(r"^(?:it is |it's )?(?:an? |the )?|[ .]", "", text.casefold())
    text = re.sub(r"(?<![0-9]) | (?![0-9])", "", text)
    bare = re.fullmatch(r"(\(*)([A-Za-z0-9.]+)(\)*)", text)
    return bare[2] if bare and len(bare[1]) == len(bare[3]) else text


def _number(text: str) -> Fraction | None:
    """Return the exact value of a number or a fraction of two, None for anything else."""
    text = plain(text)
    sign, text = (-1, text[1:]) if text[:1] == "-" else (1, text.removeprefix("+"))
    if fraction := FRACTION.fullmatch(text):
        sign, text = -sign if fraction[1] else sign, f"{fraction[2]}/{fraction[3]}"
    if not text or len(text) > MAX_DIGITS or not NUMBER.fullmatch(text):
        return None
    try:
        return sign * Fraction(re.sub("[, ]", "", text))
    except (ValueError, ZeroDivisionError):
        return None


def _items(text: str) -> tuple[str, list[str]]:
    """Return the brackets around a collection, "" without, and its items; no items where it is none."""
    if _number(text) is not None:
        return "", []
    if text.count(r"\pm") == 1 and len(_split(text)) == 1:
        return "", [text.replace(r"\pm", "+"), text.replace(r"\pm", "-")]
    if len(items := _split(text)) > 1:
        return "", items
    size = 2 if text[:2] == r"\{" else 1
    items = _split(text[size:-size]) if text[-1:] in tuple(")]}") and text[0] in "([{\\" else []
    return (text[:size] + text[-size:]).replace("\\", ""), items if len(items) > 1 else []


def _split(text: str) -> list[str]:
    """Split `text` at separators outside of brackets; no items where brackets do not match."""
    items, depth, start = [], 0, 0
    for sign in SEPARATOR.finditer(text):
        if sign[0][-1] in "([{":
            depth += 1
        elif sign[0][-1] in ")]}":
            depth -= 1
            if depth < 0:
                return []
        elif depth == 0:
            items.append(text[start : sign.start()])
            start = sign.end()
    return [item for item in (*items, text[start:]) if item.strip()] if depth == 0 else []


def _same_collection(answer: list[str], gold: list[str]) -> bool:
    """Tell whether two collections hold the same values as often, in any order."""
    names = {named[1] for item in answer if (named := NAMED.fullmatch(item))}
    if len(names) > 1 and not any(map(NAMED.fullmatch, gold)):  # x = 1, y = 2 is not 1, 2
        return False
    left = list(gold)
    for item in answer:
        match = next((place for place, other in enumerate(left) if same(item, other)), None)
        if match is None:
            return False
        del left[match]
    return not left


def _balanced(text: str) -> str:
    """Cut `text` at the first bracket that is not closed in it, or closes none."""
    waiting: list[int] = []
    for bracket in BRACKET.finditer(text):
        if bracket[0][-1] in "([{":
            waiting.append(bracket.start())
        elif waiting:
            waiting.pop()
        else:
            return text[: bracket.start()]
    return text[: waiting[0]] if waiting else text


def _latex(text: str) -> str:
    """Rewrite what LaTeX reads otherwise: thousands separators and mixed numbers in plain text."""
    return MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))
