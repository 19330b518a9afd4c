"""Writes that are on the disk, and not only in its cache, when they return."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Write a file.

    Raises:
        OSError: where it cannot be written.
    """
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(*paths: Path) -> None:
    """Have files, and the names in folders, on the disk.

    Raises:
        OSError: where that cannot be had.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
