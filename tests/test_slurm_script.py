"""The script of docs/checkpoints.md for many machines, with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs/checkpoints.md"
SRUN = """
mkdir -p runs/NAME
trap 'touch runs/NAME/again; exit 1' USR1    # the leader stops and saves, and torchrun ends with 1
echo $$ > started
case $ENDS in
by_itself) touch runs/NAME/again; exit 1;;
in_a_failure) exit 1;;
on_a_signal) while :; do sleep 0.05; done;;
esac
"""
STAND_INS = {"srun": SRUN, "scancel": 'kill -USR1 "$(cat started)"', "scontrol": 'echo "$@" >> requeued'}


@pytest.mark.parametrize(("ends", "requeued"), [("by_itself", True), ("on_a_signal", True), ("in_a_failure", False)])
def test_a_job_is_requeued_where_its_run_is_to_go_on(tmp_path: Path, ends: str, requeued: bool) -> None:
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "runs/NAME").mkdir(parents=True)
    (tmp_path / "runs/NAME/again").touch()  # of a life before
    script = DOCS.read_text().split("### Many machines")[1].split("```\n")[1]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "ENDS": ends}
    with subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=environment) as job:
        while not (tmp_path / "started").exists():
            assert job.poll() is None
            time.sleep(0.05)
        if ends == "on_a_signal":
            job.send_signal(signal.SIGUSR1)
        job.wait(timeout=20)
    told = tmp_path / "requeued"
    assert (told.read_text() if told.exists() else "") == ("requeue 7\n" if requeued else "")
