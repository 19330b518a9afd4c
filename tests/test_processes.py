"""Output of a process that nobody can take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import os, sys, warnings
from dapo_megatron.processes import leave, outlive_output
outlive_output()
print("lost", flush=True)
print("x" * 100_000)
print("lost", file=sys.stderr)
warnings.warn("lost")
with open("/dev/null", "w") as null:
    os.dup2(null.fileno(), 2)
kept = open(sys.argv[1], "w")
os.dup2(kept.fileno(), 1)
print("kept: \u00e4")
leave(3)
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that has no space")
def test_what_cannot_be_printed_is_lost_and_what_can_be_is_not(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", CODE, tmp_path / "out"], stdout=full, stderr=full, timeout=60)
    assert done.returncode == 3
    assert (tmp_path / "out").read_text(encoding="utf-8") == "kept: \u00e4\n"
