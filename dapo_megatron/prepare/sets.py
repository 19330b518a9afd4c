"""The data sets that have a name here: where each is published, its licence, and how its answers are written."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

TEMPLATE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
"""Text around each problem as DAPO's data has it: `data.template` of a run that trains as published."""
WRAPPERS = (TEMPLATE, TEMPLATE.replace("$Answer (without quotes)", r"\boxed{$Answer}"))
"""Texts that are taken off a problem where it has one. slime's copy of the data has the second."""


class Answers(StrEnum):
    """How a set writes its answers."""

    VERBATIM = "verbatim"
    """Text or an integer."""
    INTEGERS = "integers"
    """An integer, also where it is written as 27.0."""
    AFTER_HASHES = "after_hashes"
    """A number after a solution and ####, with commas between thousands."""


@dataclass(frozen=True, slots=True)
class DataSet:
    repository: str
    """On the Hugging Face hub, as owner/name."""
    files: str
    """Pattern of its files there, as fnmatch has it; a * matches slashes, too."""
    licence: str
    """What is said about it, for the data card."""
    answers: Answers = Answers.VERBATIM
    wrapped: bool = False
    """Whether a problem that is a chat message has one of `WRAPPERS` around it."""


_MAA = "the problems are the Mathematical Association of America's"

SETS = {
    "dapo-math-17k": DataSet(
        "BytedTsinghua-SIA/DAPO-Math-17k", "data/*.parquet", "apache-2.0 by its data card", wrapped=True
    ),
    "aime-2024": DataSet(
        "BytedTsinghua-SIA/AIME-2024", "data/*.parquet", f"apache-2.0 by its data card; {_MAA}", wrapped=True
    ),
    "aime-2025": DataSet("math-ai/aime25", "test*.jsonl", f"none known; {_MAA}", Answers.INTEGERS),
    "amc-2023": DataSet("math-ai/amc23", "test*.parquet", f"none known; {_MAA}", Answers.INTEGERS),
    "math-500": DataSet("HuggingFaceH4/MATH-500", "test*.jsonl", "MIT, that of MATH; none on its data card"),
    "gsm8k-test": DataSet("openai/gsm8k", "main/test*.parquet", "MIT by its data card", Answers.AFTER_HASHES),
    "gsm8k-train": DataSet("openai/gsm8k", "main/train*.parquet", "MIT by its data card", Answers.AFTER_HASHES),
}
