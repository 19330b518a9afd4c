"""Which problems of a training set occur in an evaluation set: by runs of words that they share.

A word is a run of letters or a run of digits, a CJK character is one by itself; case, blanks, punctuation and the signs
of formulas do not count. Runs of n words (n-grams) of an evaluation problem are looked for in each training problem.
Contest problems share phrases, "where m and n are relatively prime positive integers. Find m + n", so one shared run
means little: the share of the evaluation problem's runs decides. One of fewer than n words has to be the same, signs of
operations included.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dapo_megatron.prepare.rows import Problem

_CJK = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
_WORD = re.compile(rf"{_CJK}|\d+|(?:(?!{_CJK})[^\W\d_])+")

_SIGNS = "-*/%"
"""Of operations, and yet punctuation to Unicode."""

Gram = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Overlap:
    """A training problem that shares runs of words with an evaluation problem."""

    train: Problem
    evaluation: Problem
    shared: int
    """Of the different runs of the evaluation problem."""
    of: int
    longest: str
    """The longest run of words that both have."""

    @property
    def share(self) -> float:
        return self.shared / self.of


def words(text: str) -> list[str]:
    """
    >>> words("Let $x^{10}=2\\\\pi r$. 求 X 的值。")
    ['let', 'x', '10', '2', 'pi', 'r', '求', 'x', '的', '值']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def grams(text: str, n: int) -> set[Gram]:
    """Return all runs of n words; where there are fewer, the whole without case, blanks and punctuation, with signs.

    >>> grams("What is $3-1$?", n=8)
    {('whatis3-1',)}
    """
    of = words(text)
    if len(of) < n:
        whole = "".join(filter(_matters, unicodedata.normalize("NFKC", text).casefold()))
        return {(whole,)} if whole else set()
    return {tuple(of[start : start + n]) for start in range(len(of) - n + 1)}


def _matters(character: str) -> bool:
    kind = unicodedata.category(character)
    return kind[0] in "LMN" or kind in ("Sm", "So") or character in _SIGNS


def overlaps(train: Sequence[Problem], held_out: Sequence[Problem], n: int, least: float) -> list[Overlap]:
    """Return the pairs that share runs of n words, by training problem, the largest share first.

    Args:
        held_out: problems of evaluation sets.
        least: share of the runs of an evaluation problem that a pair has.
    """
    of = [grams(problem.text, n) for problem in held_out]
    where = defaultdict[Gram, list[int]](list)
    for index, runs in enumerate(of):
        for run in runs:
            where[run].append(index)
    found = []
    for problem in train:
        shared = Counter(index for run in grams(problem.text, n) for index in where.get(run, ()))
        pairs = [
            Overlap(problem, held_out[index], count, len(of[index]), _longest(problem.text, held_out[index].text))
            for index, count in shared.items()
            if count >= least * len(of[index])
        ]
        found += sorted(pairs, key=lambda pair: -pair.share)
    return found


def _longest(one: str, other: str) -> str:
    from difflib import SequenceMatcher

    first, second = words(one), words(other)
    match = SequenceMatcher(None, first, second, autojunk=False).find_longest_match()
    return " ".join(first[match.a : match.a + match.size])
