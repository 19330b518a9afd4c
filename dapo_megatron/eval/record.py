"""The folder of an evaluation: what it was made with, and every response, so that it goes on where it was stopped.

settings.json       what decides on the result, and where it came from
NAME.jsonl          a row per response to the prompts of set NAME, those of one prompt together
NAME.differ.jsonl   those that the rules do not agree on
results.json, .txt  once all responses are there
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import TypeAdapter, ValidationError

from dapo_megatron import disk
from dapo_megatron.errors import ConfigError
from dapo_megatron.types import Prompt

SETTINGS, RESULTS, TABLE = "settings.json", "results.json", "results.txt"
END = 300
"""Characters of a response that are shown where rules differ: what the published rule reads."""


@dataclass(frozen=True, slots=True)
class Graded:
    """What one rule made of a response.

    >>> Graded(correct=True, extracted="34").timed_out
    False
    """

    correct: bool
    extracted: str | None
    """Untrusted: model output."""
    timed_out: bool = False

    @classmethod
    def of(cls, grade: Grade, *, wrong: bool = False) -> Graded:
        """Take over what a rule found; `wrong` has the response count as wrong whatever its answer is."""
        return cls(grade.correct and not wrong, grade.extracted, grade.timed_out)


class Grade(Protocol):
    """`reward.math.Grade`."""

    @property
    def correct(self) -> bool: ...
    @property
    def extracted(self) -> str | None: ...
    @property
    def timed_out(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Row:
    """One response, as a line of NAME.jsonl."""

    uid: str
    """The prompt's."""
    sample: int
    """From 0."""
    answer: str
    """The gold answer."""
    seed: int
    """Of the request that all responses to the prompt came with (`rollout.engine.Sampling.seed`)."""
    length: int
    """Tokens, the end token included."""
    truncated: bool
    grades: dict[str, Graded]
    """Rule -> grade."""
    text: str
    """Untrusted: model output."""
    token_ids: list[int]


_ROW: TypeAdapter[Row] = TypeAdapter(Row)


@dataclass(frozen=True, slots=True)
class Settings:
    """What an evaluation was made with."""

    decisive: dict[str, Any]
    """Setting -> plain value: what may change a response or its grade. It has to be the same to go on."""
    origin: dict[str, Any]
    """Where model and prompts were, and the versions of what made it."""


_SETTINGS: TypeAdapter[Settings] = TypeAdapter(Settings)


class Record:
    """What there is of an evaluation in its folder.

    Args:
        samples: set -> responses per prompt.

    Raises:
        ConfigError: where the folder holds something else, an evaluation with other settings, or a row that is none.
        OSError: where it cannot be written.
    """

    def __init__(self, folder: Path, settings: Settings, samples: Mapping[str, int]) -> None:
        self.folder, self._samples = folder, samples
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / SETTINGS
        self.origin = settings.origin
        """That of the first time, where it goes on."""
        if path.exists():
            begun = read_settings(folder)
            _check_same(folder, begun, settings)
            self.origin = begun.origin
        elif any(folder.glob("*.jsonl")):
            raise ConfigError(f"{folder} holds no evaluation ({SETTINGS} is missing); choose another folder: --out DIR")
        else:
            _put(path, json.dumps(asdict(settings), indent=1) + "\n")
        self._rows = {name: read_rows(self._path(name), number, cut=True) for name, number in samples.items()}

    def missing(self, name: str, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts of a set whose responses are not there."""
        return [prompt for prompt in prompts if prompt.uid not in self._rows[name]]

    def add(self, name: str, rows: Sequence[Row]) -> None:
        """Keep all responses to one prompt, graded: whole or not at all, whenever this is cut short.

        Raises:
            OSError: where they cannot be written.
        """
        with self._path(name).open("ab") as file:
            file.write(_lines(rows))
            file.flush()
        self._rows[name][rows[0].uid] = list(rows)

    def finish(self, name: str, prompts: Sequence[Prompt]) -> list[list[Row]]:
        """Put the rows of a set into the order of its prompts, and those beside that rules do not agree on.

        Returns:
            The rows of each prompt.
        """
        ordered = [self._rows[name][prompt.uid] for prompt in prompts]
        _put(self._path(name), b"".join(map(_lines, ordered)).decode())
        differing = [row for rows in ordered for row in rows if disagree(row.grades)]
        shown = ({**asdict(row), "text": row.text[-END:]} for row in differing)
        kept = ({key: value for key, value in row.items() if key != "token_ids"} for row in shown)
        _put(self.folder / f"{name}.differ.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        return ordered

    def conclude(self, results: Mapping[str, Any], table: str) -> None:
        """Write the results, once all sets are finished."""
        _put(self.folder / TABLE, table)
        _put(self.folder / RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"


def disagree(grades: Mapping[str, Graded]) -> bool:
    """Tell whether rules disagree on a response; `grades`: rule -> grade."""
    return len({grade.correct for grade in grades.values()}) > 1


def digest(prompts: Sequence[Prompt], seen: Callable[[Prompt], Any]) -> str:
    """Return a name for what `seen` takes of the prompts, and for their order."""
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(json.dumps(seen(prompt)).encode())
    return found.hexdigest()[:16]


def digests(prompts: Sequence[Prompt]) -> dict[str, str]:
    """Return names for which problems these are, and for the tokens that the model gets of them."""
    return {
        "problems": digest(prompts, lambda prompt: [prompt.uid, prompt.answer]),
        "prompts": digest(prompts, lambda prompt: [prompt.uid, np.array(prompt.token_ids).tolist()]),
    }


def read_settings(folder: Path) -> Settings:
    """
    Raises:
        ConfigError: where there are none, or they cannot be read.
    """
    path = folder / SETTINGS
    try:
        return _SETTINGS.validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} holds no evaluation: {SETTINGS} is missing") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        issue = error.errors()[0]
        where = "".join(f"{part}: " for part in issue["loc"])
        raise ConfigError(
            f"{path} is damaged: {where}{issue['msg']}; copy it anew from where it is whole, or begin anew in another "
            f"folder: --out DIR"
        ) from error


def read_rows(path: Path, samples: int, *, cut: bool = False) -> dict[str, list[Row]]:
    """Read the rows of a set.

    Args:
        samples: responses per prompt.
        cut: take away what a process that was killed has left of the last prompt, rather than refuse it.

    Returns:
        uid -> its rows, in the order of the file.

    Raises:
        ConfigError: for a line that is no row, with its number, and for a prompt that has not `samples` of them.
    """
    found: dict[str, list[Row]] = {}
    whole = 0
    for rows, end in _groups(path, samples):
        found[rows[0].uid], whole = rows, end
    if path.exists() and path.stat().st_size > whole:
        if not cut:
            raise ConfigError(f"{path} ends within the responses to a prompt; the evaluation was not finished")
        with path.open("r+b") as file:
            file.truncate(whole)
    return found


def _groups(path: Path, samples: int) -> Iterator[tuple[list[Row], int]]:
    """Yield the rows of each prompt that are there as a whole, and the byte at which they end."""
    rows: list[Row] = []
    end = 0
    with path.open("rb") if path.exists() else _Nothing() as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                rows.append(_ROW.validate_python(json.loads(line)))
            except ValidationError as error:
                issue = error.errors()[0]
                where = ".".join(map(str, issue["loc"]))
                raise ConfigError(f"{path}:{number} is no row of an evaluation: {where}: {issue['msg']}") from error
            except ValueError as error:
                raise ConfigError(f"{path}:{number} is not JSON: {error}") from error
            end += len(line)
            if rows[-1].uid != rows[0].uid or rows[-1].sample != len(rows) - 1:
                raise ConfigError(
                    f"{path}:{number}: expected sample {len(rows) - 1} of {samples} of {rows[0].uid}, found sample "
                    f"{rows[-1].sample} of {rows[-1].uid}; restore the file, or begin anew in another folder: --out DIR"
                )
            if len(rows) == samples:
                yield rows, end
                rows = []


class _Nothing:
    def __enter__(self) -> Sequence[bytes]:
        return ()

    def __exit__(self, *_: object) -> None: ...


def _check_same(folder: Path, old: Settings, new: Settings) -> None:
    keys = {**old.decisive, **new.decisive}
    differing = [key for key in keys if old.decisive.get(key) != new.decisive.get(key)]
    if differing:
        lines = (
            f"  {key}: {_said(old.decisive.get(key))} there, {_said(new.decisive.get(key))} here" for key in differing
        )
        raise ConfigError(
            f"{folder} holds an evaluation with other settings:\n"
            + "\n".join(lines)
            + "\nset them back (problems are known by the names of their files, too) to go on with it, or choose "
            "another folder: --out DIR"
        )


def _said(value: Any) -> str:
    return "nothing" if value is None else str(value)


def _lines(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode()


def _put(path: Path, text: str) -> None:
    """Put `text` in the place of `path`: whenever this is cut short, one or the other is there, whole."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    disk.write(unfinished, text.encode())
    unfinished.replace(path)
