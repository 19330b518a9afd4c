"""Numbers as people read them."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """1 file, 2 files."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size(nbytes: int) -> str:
    """Return a size in the largest unit of which it has one: 999 bytes, 1.5 kB, 459.2 GB."""
    for unit, worth in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= worth:
            return f"{nbytes / worth:,.1f} {unit}"
    return counted(nbytes, "byte")
