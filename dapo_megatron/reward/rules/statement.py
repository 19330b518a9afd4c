r"""This module finds where a response states its final answer.

A statement is a \boxed{}, an `<answer>` tag, GSM8K's last line `#### 34`, or the word "answer" (in one of several
languages) with a colon, as a heading, or with a verb and a value (`the answer is 34`, `34 is the answer`). The last
statement counts, so that a correction does; what stands before `</think>` is no statement. A box states what it
holds, anything else what follows up to the end of the line, or of the display block, in which its value begins.
"""

from __future__ import annotations

import re
import unicodedata

COMMANDS = (
    dict.fromkeys("\u00b7\u22c5", "cdot")
    | {"\u00d7": "times", "\u00b1": "pm", "\u2264": "le", "\u2265": "ge", "\u2248": "approx", "\u2208": "in"}
    | {"\u222a": "cup", "\u03c0": "pi", "\u03b8": "theta", "\u221e": "infty"}
)
SPELLINGS = str.maketrans(
    {sign: f"\\{name} " for sign, name in COMMANDS.items()}
    | dict.fromkeys("\u2212\u2013\ufe63", "-")  # minus, en dash, small hyphen
    | dict.fromkeys("\u201c\u201d\u300c\u300d\u3010\u3011", '"')  # quotes, and brackets around words
    | {"\u3002": ". ", "\u3001": ", ", "\u2019": "'", "\u00f7": "/", "\u221a": "sqrt", "\u00b0": r"^\circ "}
    | {"\u00b9": "^1", "\u00b2": "^2", "\u00b3": "^3", "\u00bc": " 1/4", "\u00bd": " 1/2", "\u00be": " 3/4"}
)
"""Signs that LaTeX or plain text spells otherwise. Full-width forms are left to Unicode's NFKC."""

WORDS = (
    r"answers?|(?<![^\W\d_])(?:ans\b\.?|r[ée]ponse|respuesta|resposta|risposta|antwort|antwoord|svar(?:et)?|odpowied[źz]"
    r"|cevap|jawaban|đáp\s(?:án|số)|ответ|відповідь|उत्तर|الإجابة|الجواب|תשובה)|答案|(?<![解回])答え?|정답|답"
)
IS = (
    r"(?<![^\W\d_])(?:is|are|be|equals?|comes\s(?:out\s)?to|est|es|é|è|ist|lautet|jest|är|là|adalah|равен)(?![^\W\d_])"
    r"|是|为|為|は|는|은|=|\\approx"
)
AND = r"(?<![A-Za-z])(?:and|or|und|oder|et|ou)(?![A-Za-z])|和|或者?"
JUST = r"(?:\s+(?:therefore|thus|hence|then|simply|just|exactly|precisely|approximately|about|equal\sto|given\sby))*"
# Like mathematics, not like prose.
VALUE = r"(?=[\s*_\"`:]*(?:[-+]?\s?(?:\.?\d|[\\$({\[|€£¥])|sqrt|(?!a\s)[A-Za-z](?![A-Za-z'])))"

LABEL = re.compile(
    rf"""<answer> | ^\#\#\#\#(?!.*\n\s*\S)
    | (?P<inverted>\b(?:is|are)\s(?:the|our|my)\s(?:final\s|correct\s)?answer\b)
    | (?:{WORDS})(?:
        (?P<gap>[^\n:.?!]{{0,60}}?)
        (?:(?P<colon>[\s*_"`)\]]{{0,8}}:) | (?P<verb>\s?(?:{IS}){JUST}{VALUE}) | (?P<prose>\sis\s))
      | (?P<heading>[*_"\ \t]{{0,8}}(?:\n|(?:->|→|-|\u2014)?{VALUE}))
    )""",
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
STARTS_A_LINE = re.compile(
    r"(?:[\s#*_>\"(\[-]|the|my|our|final|correct|exact|short|so|thus|hence|therefore|and|,|la|le|die|最终|最後|所以|因此)*",
    re.IGNORECASE,
)
NOT_STATED = re.compile(
    r"\b(?:if|suppose|assum\w*|whether|unless|not|never|cannot|doubt|previous|first|initial|earlier|old|other|another|wrong)\b"
    r"|n't\b|不",
    re.IGNORECASE,
)
DECORATION = re.compile(r"[\s*_#\"`:]*")
DELIMITERS = {r"\[": r"\]", "$$": "$$", r"\(": r"\)"}

BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|(?<!\\)[{}]")
TOGETHER = re.compile(rf"[\s$)(\\]*(?:,|;|{AND})[\s$)(\\]*(?:[A-Za-z]\s*=\s*)?")
GOES_ON = re.compile(r"[\s$)\\]*(?:or|dozen|hundred|thousand|million|billion)\b")


def final_answer(response: str) -> str | None:
    r"""Return the part of a response that states its answer; None where there is none, or where it is cut off.

    >>> final_answer("Thus x = 35. No, the answer is 34, since 2 * 17 = 34.")
    '34, since 2 * 17 = 34.'
    >>> final_answer(r"It is \boxed{\frac{1}{2}}, not \boxed{\frac{1}") is None
    True
    """
    text = spelled_out(response).rpartition("</think>")[2]
    box_start, boxed = _last_box(text)
    in_prose = None
    for label in reversed(list(LABEL.finditer(text, max(box_start, 0)))):
        stated = _before(text, label.start()) if label["inverted"] else _after(text, label.end())
        if stated == "" or not _is_statement(text, label):
            continue
        if not _is_prose(text, label):
            return stated
        in_prose = in_prose or stated
    return in_prose if box_start < 0 else boxed


def spelled_out(text: str) -> str:
    """Give each sign of `text` one spelling."""
    return unicodedata.normalize("NFKC", text.translate(SPELLINGS)).replace("\u2044", "/")


def _is_statement(text: str, label: re.Match[str]) -> bool:
    """Tell whether a label announces an answer, rather than denies, supposes or asks for one."""
    if label["heading"]:
        return _starts_a_line(text, label)
    if label["gap"] is None:  # a tag, ####, or an inverted sentence
        return True
    before = re.split(r"[.;:?!\n]\s?", text[max(0, label.start() - 100) : label.start()])[-1]
    end = re.search(r"[?\n]|\.\s", text[label.end() : label.end() + 100])
    return not NOT_STATED.search(before + label["gap"]) and not (end and end[0] == "?")


def _is_prose(text: str, label: re.Match[str]) -> bool:
    """Tell whether a label may be part of the reasoning (`check the answer: it is odd`), so that others go first."""
    if label["colon"]:
        return not _starts_a_line(text, label) and not re.compile(VALUE).match(text, label.end())
    return label["prose"] is not None


def _starts_a_line(text: str, label: re.Match[str]) -> bool:
    line = text[max(text.rfind("\n", 0, label.start()) + 1, label.start() - 100) : label.start()]
    return STARTS_A_LINE.fullmatch(line) is not None


def _after(text: str, start: int) -> str | None:
    """Return the line or display block in which a value begins; None where a delimiter is not closed."""
    match = DECORATION.match(text, start)
    assert match
    start = end = match.end()
    if closing := DELIMITERS.get(text[start : start + 2]):
        end = text.find(closing, start + 2)
        if end < 0:
            return None
    return text[start : text.find("\n", end) % (len(text) + 1)]


def _before(text: str, end: int) -> str:
    """Return what a sentence says up to `end`."""
    return re.split(r"[.!?;]\s", text[max(text.rfind("\n", 0, end) + 1, end - 200) : end])[-1]


def _last_box(text: str) -> tuple[int, str | None]:
    """Find where the last box starts, -1 without one, and what it says; None if the text ends within it.

    Boxes with nothing but "and", "or" or a comma in between count as one, and so does what changes a box after it.
    """
    start, end = -1, 0
    waiting: list[int | None] = []  # braces that are open: where a box starts, None for any other
    for brace in BRACE.finditer(text):
        if brace[0] != "}":
            waiting.append(brace.start() if brace[0] != "{" else None)
        elif waiting and (box := waiting.pop()) is not None:
            between = text[end:box]
            start = start if start >= 0 and len(between) < 50 and TOGETHER.fullmatch(between) else box
            end = brace.end()
    if (cut_off := max((box for box in waiting if box is not None), default=-1)) >= end:
        return cut_off, None
    if start >= 0 and GOES_ON.match(text, end):
        end = text.find("\n", end) % (len(text) + 1)
    return start, text[start:end] if start >= 0 else None
