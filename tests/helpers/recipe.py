"""A recipe's values beside those that it reproduces: `python -m tests.helpers.recipe` prints the table of the docs.

In the file, `# paper A; code B` behind a value says what the paper and the released code have, and the comment above it
what is different here, and why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs/qwen2.5_32b_aime.yaml"
LINE = re.compile(r"( *)([\w-]+):(?: +([^#\s][^#]*?))?(?: +# (.*))?")
SOURCES = re.compile(r"(?:paper ([^;]+?))?(?:; |$)?(?:code (.+))?")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
SWITCH = {"true": "on", "false": "off", "none": "off"}


@dataclass(frozen=True)
class Value:
    key: str
    """With its sections: `algo.dapo.clip_high`."""
    text: str
    """As the file has it; for a text of several lines, `text`."""
    paper: str | None
    """What the paper has; None where it says nothing."""
    code: str | None
    remark: str

    @property
    def differs(self) -> bool:
        """Whether the paper or the code has another number, or has on what is off here."""
        return any(not _alike(self.text, source) for source in (self.paper, self.code) if source)


def _alike(text: str, source: str) -> bool:
    """Other texts than numbers and switches are taken to be alike: they are for people to compare."""
    here, there = SWITCH.get(text, text), SWITCH.get(source, source)
    if {here, there} & {"on", "off"}:
        return here == there
    numbers, others = (NUMBER.findall(words.replace(",", "")) for words in (here.replace(", ", " "), there))
    return not numbers or not NUMBER.match(here.strip("[")) or [*map(float, numbers)] == [*map(float, others)]


def read(path: Path = RECIPE) -> list[Value]:
    """All values of a recipe, in its order.

    Raises:
        ValueError: for a comment behind a value that is not of the form.
    """
    return list(_values(path.read_text(encoding="utf-8").splitlines()))


def _values(lines: list[str]) -> Iterator[Value]:
    sections: list[tuple[int, str]] = []
    remark: list[str] = []
    inside: int | None = None  # the indentation of the key whose text of several lines this is
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if inside is not None and (depth > inside or not line):
            continue
        inside = None
        if not line:
            remark = []
            continue
        if line.lstrip().startswith("#"):
            remark.append(line.lstrip("# "))
            continue
        match = LINE.fullmatch(line)
        if not match:
            raise ValueError(f"{line!r} is neither a key nor a comment")
        _, key, text, comment = match.groups()
        sections = [(at, name) for at, name in sections if at < depth] + [(depth, key)]
        if text is None:
            continue
        if text.startswith("|"):
            inside, text = depth, "text"
        sources = SOURCES.fullmatch(comment or "")
        if not sources:
            raise ValueError(f"{line!r}: the comment is not of the form 'paper A; code B'")
        yield Value(".".join(name for _, name in sections), text, sources[1], sources[2], " ".join(remark))
        remark = []


def table(values: list[Value]) -> str:
    """Markdown, a row for each value that has a source or a remark."""
    rows = ["| key | here | paper | released code | remark |", "| --- | --- | --- | --- | --- |"]
    for value in values:
        if not (value.paper or value.code or value.remark):
            continue
        cells = (f"`{value.key}`", value.text, value.paper or "", value.code or "", value.remark.replace("|", r"\|"))
        rows.append("|".join(["", *(f" {cell} " if cell else " " for cell in cells), ""]))
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(read()), end="")
