"""What is left out of a set, one filter after the other, and the account of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dapo_megatron.errors import ConfigError
from dapo_megatron.prepare.rows import Problem


@dataclass(slots=True)
class Filtered:
    """Problems that are left, and those that were left out so far."""

    rows: int
    """Read, repeats included."""
    problems: list[Problem]
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Of each filter its name, why, and how many it removed and left."""
    removed: list[dict[str, Any]] = field(default_factory=list)
    """Each problem that was left out, with the filter and more; repeats are not listed."""

    def leave_out(self, name: str, why: str, removes: Callable[[Problem], dict[str, Any] | None]) -> None:
        """Leave out what `removes` has an account of, be it an empty one.

        Raises:
            ConfigError: where nothing is left.
        """
        left = []
        for problem in self.problems:
            account = removes(problem)
            if account is None:
                left.append(problem)
            else:
                known = {"uid": problem.uid, "source": problem.source, "prompt": problem.text, "answer": problem.answer}
                self.removed.append({"filter": name, **known, **account})
        if not left:
            raise ConfigError(f"the filter {name} ({why}) leaves none of {len(self.problems):,} problems")
        self.count(name, why, len(self.problems) - len(left), len(left))
        self.problems = left

    def count(self, name: str, why: str, removed: int, left: int) -> None:
        self.steps.append({"filter": name, "why": why, "removed": removed, "left": left})


def distinct(problems: Iterable[Problem]) -> Filtered:
    """Keep the first copy of each problem, and none of those whose copies have different answers.

    Two problems are the same where their texts are, character by character. Answers are compared as text.

    Raises:
        ConfigError: where nothing is left.
    """
    rows, first, answers = 0, dict[str, Problem](), dict[str, dict[str, str]]()
    for problem in problems:
        rows += 1
        copy = first.setdefault(problem.text, problem)
        if problem.answer != copy.answer:
            answers.setdefault(problem.text, {copy.answer: copy.uid}).setdefault(problem.answer, problem.uid)
    filtered = Filtered(rows, list(first.values()))
    filtered.count("repeats", "the text is that of a row before", rows - len(first), len(first))
    filtered.leave_out(
        "contradictory",
        "copies have different answers; none is kept",
        lambda problem: {"answers": other} if (other := answers.get(problem.text)) else None,
    )
    return filtered


def without_images(filtered: Filtered) -> None:
    filtered.leave_out("images", "an image, or a link", lambda problem: {} if problem.has_image else None)


def only_languages(filtered: Filtered, languages: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: where a language does not occur.
    """
    there = Counter(problem.language for problem in filtered.problems)
    if missing := [language for language in languages if language not in there]:
        counts = ", ".join(f"{language} {count:,}" for language, count in there.most_common())
        raise ConfigError(f"--languages: no problem is {', '.join(missing)}; there are {counts}")
    filtered.leave_out(
        "languages",
        f"another language than {', '.join(languages)}",
        lambda problem: None if problem.language in languages else {"language": problem.language},
    )
