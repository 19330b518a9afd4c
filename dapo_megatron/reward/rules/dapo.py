"""This is the string rule DAPO was published with: what follows the last `Answer:` equals the gold answer as text.

It departs from the published rule in one report only: where there is no label it gives no answer, not "[INVALID]".
"""

from __future__ import annotations

import re

READ = 300
"""Characters from the end of the response that are searched."""

LABEL = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")

REPLACED = {
    "an ": "",
    "a ": "",
    ".$": "$",
    r"\$": "",
    "\\ ": "",
    " ": "",
    "mbox": "text",
    r",\text{and}": ",",
    r"\text{and}": ",",
    r"\text{m}": r"\text{}",
}
"""Replaced one after the other, in this order."""

DELETED = [
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", r"\ldots", "sue", "points"),
    *("feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples", r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3"),
    *("\\text{\n}", r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
]
"""Deleted one after the other, in this order, wherever they stand, inside words too."""

REWRITTEN = [
    (re.compile(r".*?\$(.*?)\$.*"), r"$\1$"),  # the first $...$ is all that counts
    (re.compile(r"\\text\{(.*?)\}"), r"\1"),
    (re.compile(r"\\textbf\{(.*?)\}"), r"\1"),
    (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),
]
"""Applied in this order."""


def grade(response: str, answer: str) -> tuple[bool, str | None]:
    """Tell whether the last label's line equals `answer`, both normalised; the line is returned too."""
    found = LABEL.findall(response[-READ:])
    if not found:
        return False, None
    extracted = normalise(found[-1])
    return extracted == normalise(answer), extracted


def normalise(text: str) -> str:
    r"""Return the form in which two answers are compared as strings.

    >>> normalise(r"x = $\frac12$ degrees"), normalise("1,234 students")
    ('\\frac{1}{2}', '1234')
    """
    text = text.rpartition("=")[2]
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    for old in DELETED:
        text = text.replace(old, "")
    for pattern, new in REWRITTEN:
        text = pattern.sub(new, text)
    text = text.replace("$", "")
    digits = text.replace(",", "")
    return (digits if digits.isdigit() else text).strip()
