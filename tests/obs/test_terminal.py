from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from dapo_megatron.obs.terminal import Diverted, printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1+2=3\nAnswer: 3", "1+2=3\nAnswer: 3"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\tc\x00", r"a\rb\tc\x00"),
        ("\x9b31m", r"\x9b31m"),  # the one-byte form of ESC [
        ("\u202eevil", r"\u202eevil"),
        ("half \ud83d of a pair", r"half \ud83d of a pair"),
        ("ünï 数学 √2", "ünï 数学 √2"),
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_of_a_long_text_the_end_is_shown() -> None:
    assert printable("thinking" * 100 + "Answer: 3", 9) == "...Answer: 3"


PROGRAM = """
import logging, os, subprocess, sys, warnings
from pathlib import Path
from dapo_megatron.obs.terminal import Diverted
print("before")
diverted = Diverted(Path(sys.argv[1]))
print("python chatter")
os.write(2, b"chatter of a C++ library\\n")
subprocess.run(["echo", "chatter of a child"])
logging.getLogger("transformers").warning("a log record")
warnings.warn("a Python warning")
print("shown", file=diverted.terminal, flush=True)
diverted.close()
diverted.close()
print("after")
os.write(2, b"error\\n")
"""


def test_chatter_goes_to_the_log_and_the_terminal_comes_back(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(log)], capture_output=True, text=True, check=True)
    assert done.stdout == "before\nshown\nafter\n"
    assert done.stderr == "error\n"
    written = log.read_text()
    for chatter in ("python chatter", "C++ library", "of a child", "WARNING transformers: a log record", "UserWarning"):
        assert chatter in written
    assert "shown" not in written


@pytest.mark.parametrize(
    ("before", "after"), [("", "new\n"), ("whole\n", "whole\nnew\n"), ("saving ...\rsav", "saving ...\rsav\nnew\n")]
)
def test_a_log_goes_on_on_a_line_of_its_own(tmp_path: Path, before: str, after: str) -> None:
    log = tmp_path / "log.txt"
    log.write_text(before, newline="")
    diverted = Diverted(log)
    diverted.note("new")
    diverted.close()
    assert log.read_bytes().decode() == after


def test_nothing_stays_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def state() -> tuple[object, ...]:
        descriptors = sorted(path.name for path in Path("/proc/self/fd").iterdir())
        return descriptors, list(logging.getLogger().handlers), warnings.showwarning

    before = state()
    Diverted(tmp_path / "log.txt").close()
    assert state() == before
