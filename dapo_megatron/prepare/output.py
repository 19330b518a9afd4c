"""What is written: a parquet file for each set, what was left out and why, and the data card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dapo_megatron import disk
from dapo_megatron.checkpoint.folder import describe
from dapo_megatron.config.evaluation import is_set_name
from dapo_megatron.prepare.rows import Problem

CARD, README, REMOVED, OVERLAP = "card.json", "README.md", "removed.jsonl", "overlap.jsonl"
_COLUMNS = {
    "prompt": "the problem, without a template",
    "answer": "the gold answer",
    "uid": "file and row that it comes from",
    "source": "the set that it comes from",
    "language": "of the problem",
}


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """Write a parquet file that `data.train` and `eval.data` read with the defaults of `data.prompt_field` and
    `data.answer_field`: columns of text, a row for each problem.

    Raises:
        OSError: where it cannot be written.
    """
    import pyarrow
    from pyarrow import parquet

    columns = {
        name: [getattr(problem, {"prompt": "text"}.get(name, name)) for problem in problems] for name in _COLUMNS
    }
    table = pyarrow.table(columns, schema=pyarrow.schema([(name, pyarrow.string()) for name in columns]))
    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(table, buffer)
    disk.write(path, buffer.getvalue().to_pybytes())


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, in the letters of the problems.

    Raises:
        OSError: where they cannot be written.
    """
    disk.write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write the data card twice, for programs and for people, with the sizes and hashes of the other files.

    Raises:
        OSError: where a file cannot be read back, or the card not be written.
    """
    written = {file.name: describe(file) for file in sorted(folder.iterdir())}
    card = {
        **card,
        "files": {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in written.items()},
    }
    disk.write(folder / CARD, (json.dumps(card, indent=1, ensure_ascii=False) + "\n").encode())
    disk.write(folder / README, as_text(card).encode())


def as_text(card: Mapping[str, Any]) -> str:
    """Return the card in Markdown."""
    sets = [card["train"], *card["evaluation"].values()]
    parts = [
        "# Data card",
        f"Made by `{card['made_by']}`. {CARD} has the same for programs.",
        "## Training set",
        _training(card["train"]),
        "## Evaluation sets",
        _evaluation(card["evaluation"]),
        "## Overlap with evaluation sets",
        _overlap(card["overlap"]),
        "## Where it comes from",
        _table(
            ("set", "repository", "revision", "licence", "file", "bytes", "SHA-256"),
            [
                (
                    *(source["name"], source["repository"] or "", source["revision"] or ""),
                    *(source["licence"] or "not stated", file["name"], f"{file['bytes']:,}", file["sha256"]),
                )
                for part in sets
                for source in part["sources"]
                for file in source["files"]
            ],
        ),
        "## Files",
        _table(
            ("file", "bytes", "SHA-256"),
            [(name, f"{file['bytes']:,}", file["sha256"]) for name, file in card["files"].items()],
        ),
        f"Columns of the parquet files, all text: {'; '.join(f'`{name}`, {what}' for name, what in _COLUMNS.items())}. "
        f"{REMOVED} has each problem that was left out, by filter, {OVERLAP} each pair of problems that share text.",
        "## Training on it",
        f"```yaml\n{config_lines('.', card)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _training(part: Mapping[str, Any]) -> str:
    rows = [("", "rows read", "", f"{part['rows']:,}")]
    rows += [(step["filter"], step["why"], f"{step['removed']:,}", f"{step['left']:,}") for step in part["filters"]]
    filters = _table(("filter", "what it leaves out", "left out", "stay"), rows)
    return f"{filters}\n\nBy language: {_languages(part)}."


def _evaluation(parts: Mapping[str, Mapping[str, Any]]) -> str:
    if not parts:
        return "None."
    rows = [(name, f"{part['rows']:,}", f"{part['problems']:,}", _languages(part)) for name, part in parts.items()]
    return "Only repeats are left out.\n\n" + _table(("set", "rows", "problems", "by language"), rows)


def _languages(part: Mapping[str, Any]) -> str:
    return ", ".join(f"{language} {count:,}" for language, count in part["languages"].items())


def _overlap(overlap: Mapping[str, Any]) -> str:
    if not overlap["sets"]:
        return "There are no evaluation sets to compare with."
    rule = (
        f"Runs of {overlap['ngram']} words: a training problem was left out where it has at least "
        f"{overlap['share']:.0%} of those of an evaluation problem."
    )
    rows = [
        (name, f"{counts['problems']:,}", f"{counts['removed']:,}", f"{counts['kept']:,}")
        for name, counts in overlap["sets"].items()
    ]
    heads = (
        "evaluation set",
        "problems of it that occur",
        "training problems left out",
        "kept, with half of that or more",
    )
    return f"{rule}\n\n{_table(heads, rows)}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())


def config_lines(folder: str | Path, card: Mapping[str, Any]) -> str:
    """Return the sections of a configuration that read what was written to `folder`."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Text of several lines as it is, line by line."""

    def block(dumper: Dumper, text: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(str, block)
    sections: dict[str, Any] = {"data": {"train": f"{folder}/{card['train']['file']}", **card["prompt"]}}
    files = {name: f"{folder}/{part['file']}" for name, part in card["evaluation"].items()}
    if len(files) == 1:
        sections["eval"] = {"data": next(iter(files.values()))}
    elif files:
        names = [name if is_set_name(name) else f"set{number}" for number, name in enumerate(files, start=1)]
        sections["eval"] = {"sets": {name: {"data": file} for name, file in zip(names, files.values(), strict=True)}}
    return yaml.dump(sections, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)
