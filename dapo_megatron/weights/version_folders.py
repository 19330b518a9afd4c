"""The names of the versions of the weights in a folder: `version-N` is a whole one, `.version-N.unfinished` is not."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

_VERSION = re.compile(r"version-(\d+)(?:\.(\d+))?")
_UNFINISHED = re.compile(rf"\.{_VERSION.pattern}\.unfinished")


def version_folder(folder: Path, version: int) -> Path:
    """Return where to write a version: version-N, or version-N.2, version-N.3, ... where that is there already.

    An engine may have mapped the files of that one, or another machine remember them.
    """
    written = [again for number, again, _ in _versions(folder) if number == version]
    return folder / (f"version-{version}.{max(written) + 1}" if written else f"version-{version}")


def unfinished(target: Path) -> Path:
    """Return the name of a version that is being written."""
    return target.with_name(f".{target.name}.unfinished")


def newest(folder: Path) -> Path | None:
    """Return the whole version of the highest number, the one written last of several; None where there is none."""
    return max(_versions(folder), default=(0, 0, None))[2]


def all_versions(folder: Path) -> list[Path]:
    """Return all versions, whole or not."""
    return [path for path in _inside(folder) if _VERSION.fullmatch(path.name) or _UNFINISHED.fullmatch(path.name)]


def remove_others(folder: Path, kept: Path | None) -> None:
    """Remove all versions but one, as far as that can be done, and nothing else that may be there."""
    for other in all_versions(folder):
        if other != kept:
            shutil.rmtree(other, ignore_errors=True)


def _versions(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """Yield the number of each whole version, which of those with this number it is, from 1, and its folder."""
    for path in _inside(folder):
        if found := _VERSION.fullmatch(path.name):
            yield int(found[1]), int(found[2] or 1), path


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # not there yet; whoever writes to it finds out what else it may be
        return []
