"""Ranks under the launcher that do something else than training, and how they end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import yaml

from tests.helpers.checkpoint import values

LIMITS = ["launch.lost_seconds=3", "launch.collective_seconds=120"]


def write_config(folder: Path) -> Path:
    """A configuration that passes every check, of a run in folder/runs."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values(folder)))
    (folder / "runs").mkdir()
    return path


@contextmanager
def job(
    config: Path, scene: str, *overrides: str, ranks: int = 2, module: str = "rank_job"
) -> Iterator[subprocess.Popen[str]]:
    """`cli._launch` on ranks that run tests/helpers/`module`.py with `scene`."""
    command = [f"tests.helpers.{module}", scene, str(config), *LIMITS, *overrides]
    program = f"import sys; from dapo_megatron import cli; sys.exit(cli._launch({ranks}, {command}))"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
    )
    family: Sequence[psutil.Process] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
        for member in (*family, process):
            member.kill()


def ranks_of(process: subprocess.Popen[str], config: Path, count: int = 2) -> list[psutil.Process]:
    """The ranks, once all are at what they are to do."""
    deadline = time.monotonic() + 60
    while len(list((config.parent / "runs").glob("ready*"))) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1.5)
    return sorted(psutil.Process(process.pid).children(), key=lambda rank: rank.environ()["RANK"])


def ended(process: subprocess.Popen[str], family: Sequence[psutil.Process] = (), timeout: float = 60) -> str:
    """Its output, once it and its processes are gone."""
    output, _ = process.communicate(timeout=timeout)
    _, left = psutil.wait_procs(family, timeout=5)
    assert not left
    return output
