"""Reads rows from JSON lines, parquet and the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dapo_megatron.errors import ConfigError

HUB = "hub:"


def read_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (uid, row) for every row. The uid is the file's name and the line, counted from 1: `train.jsonl:12`.

    Args:
        source: a .jsonl or .parquet file, or hub:NAME[/SPLIT], where NAME is as the hub spells it (owner/name) and the
            split is train unless given.

    Raises:
        ConfigError: where there is no such file, data set or split; for an unknown suffix, no rows at all, and a line
            that is not a JSON object.
    """
    rows = _hub(source) if source.startswith(HUB) else _file(Path(source))
    name = source if source.startswith(HUB) else Path(source).name
    number = 0
    for number, row in rows:
        yield f"{name}:{number}", row
    if not number:
        raise ConfigError(f"{source} holds no rows")


def _file(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    readers = {".jsonl": _json_lines, ".parquet": _parquet}
    if path.suffix not in readers:
        raise ConfigError(f"cannot read {path}: expected a {' or '.join(readers)} file, or {HUB}NAME[/SPLIT]")
    if not path.is_file():
        raise ConfigError(f"cannot read {path}: {'it is a folder' if path.is_dir() else 'there is no such file'}")
    return readers[path.suffix](path)


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}:{number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}:{number} must be a JSON object, one a line; got {type(row).__name__}")
            yield number, row


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from enumerate(rows, 1)
    except (ArrowException, OSError) as error:
        raise ConfigError(f"cannot read {path} as parquet: {error}") from error


def _hub(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets

    parts = source.removeprefix(HUB).split("/")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise ConfigError(
            f"data source {source!r} is not of the form {HUB}NAME[/SPLIT], for example hub:owner/name/test"
        )
    name, split = "/".join(parts[:2]), parts[2] if len(parts) == 3 else "train"
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, authentication, unknown names: each library beneath has errors of its own
        raise ConfigError(
            f"cannot load split {split!r} of {name!r} from the Hugging Face hub: {error}; without network, download it "
            f"elsewhere and give a .jsonl or .parquet file"
        ) from error
    yield from enumerate(map(dict, rows), 1)
