"""Runs the GPU tests and benches, and adds what they print to docs/gpu-results.md.

    python -m benchmarks.gpu_report smoke     what needs neither Transformer Engine nor vLLM, in 8 minutes
    python -m benchmarks.gpu_report all

A run is one section, the newest first: date, card, driver, versions, every target beside what was measured, and the end
of every output as it was. A step that fails or takes too long does not keep the others from running. Exits with 1 where
one failed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/gpu-results.md"
LOGS = ROOT / ".gpu/logs"
RUNS = "\n## Runs\n"
"""The heading in RESULTS under which runs stand."""
PACKAGES = ("torch", "megatron-core", "mbridge", "transformers", "transformer-engine", "vllm")
SHOWN_LINES = 60


@dataclass(frozen=True)
class Step:
    title: str
    arguments: str
    """Of the interpreter."""
    limit: float
    """Seconds."""


_CHECK = "-m dapo_megatron check-reduction configs/quickstart_cpu.yaml"
"""Every layout that the GPUs are enough for."""
_ALONE = f"{_CHECK} --layouts 1 --processes 1"
_PUSHES = "tests/weights/test_handles.py tests/weights/test_between_processes.py"
SUITES = {
    "smoke": (
        Step("Tests", f"-m pytest -q -m gpu tests/actor tests/check_reduction tests/obs/test_memory.py {_PUSHES}", 180),
        Step("Reduction, float32", f"{_ALONE} --dtype float32 model.layers=torch", 60),
        Step("Reduction, bfloat16", f"{_ALONE} --dtype bfloat16 model.layers=torch", 60),
        Step("Training step", "-m benchmarks.gpu_step --layers torch --tokens 16384 --rounds 2", 120),
        Step("Log-probs", "-m benchmarks.gpu_logprob", 60),
    ),
    "all": (
        Step("Tests", "-m pytest -q -m gpu tests", 3600),
        Step("Reduction, Transformer Engine", f"{_CHECK} --dtype bfloat16", 900),
        Step("Reduction, torch's layers, float32", f"{_CHECK} --dtype float32 model.layers=torch", 900),
        Step("Reduction, torch's layers, bfloat16", f"{_CHECK} --dtype bfloat16 model.layers=torch", 900),
        Step("Training step", "-m benchmarks.gpu_step", 300),
        Step("Training step, whole layers recomputed", "-m benchmarks.gpu_step --recompute full", 300),
        Step("Training step, torch's layers", "-m benchmarks.gpu_step --layers torch", 300),
        Step("Log-probs", "-m benchmarks.gpu_logprob", 120),
        Step("Pushes", "-m benchmarks.gpu_publish", 300),
        Step("A DAPO step", "-m benchmarks.gpu_rollout", 900),
        Step("A DAPO step, the engine asleep while the actor trains", "-m benchmarks.gpu_colocated", 900),
    ),
}


@dataclass(frozen=True)
class Outcome:
    step: Step
    exit_code: int | None
    """None where it ran into the limit."""
    seconds: float
    output: str

    @property
    def ended(self) -> str:
        if self.exit_code is None:
            return f"stopped at its limit of {self.step.limit:.0f} s"
        return f"exit code {self.exit_code}, {self.seconds:.0f} s"

    @property
    def targets(self) -> list[tuple[str, str]]:
        """What `gpu_shapes.verdict` printed: target and verdict."""
        lines = [line.removeprefix("target: ") for line in self.output.splitlines() if line.startswith("target: ")]
        return [(target, verdict.strip()) for target, _, verdict in (line.rpartition(":") for line in lines)]


def run(step: Step) -> Outcome:
    """Run a step from the root of the repository, and show what it has printed."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{step.title.lower().replace(' ', '_')}.log"
    print(f"--- {step.title}: python {step.arguments}\n(meanwhile: tail -f {log})", flush=True)
    started = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
    # A file, because a pipe is held open by whatever a step that was stopped leaves behind.
    with log.open("w+", errors="replace") as file:
        command = [sys.executable, *step.arguments.split()]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(step.limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        seconds = time.monotonic() - started
        file.seek(0)
        output = file.read()
    print(output, flush=True)
    return Outcome(step, code, seconds, output)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what a step leaves behind, its ranks and engines among it."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return
    process.wait()


def section(suite: str, outcomes: Sequence[Outcome], facts: dict[str, str]) -> str:
    """Return a run as Markdown."""
    targets = [(outcome.step.title, *target) for outcome in outcomes for target in outcome.targets]
    lines = [f"### {facts['date']}, {facts['card']}, {suite}", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    lines += ["| step | ended |", "| --- | --- |"]
    lines += [*(f"| {outcome.step.title} | {outcome.ended} |" for outcome in outcomes), ""]
    if targets:
        lines += ["| bench | target | |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in targets), ""]
    for outcome in outcomes:
        shown = outcome.output.rstrip().splitlines()[-SHOWN_LINES:]
        lines += [f"`python {outcome.step.arguments}`", "", "```", *(line.replace("```", "'''") for line in shown)]
        lines += ["```", ""]
    return "\n".join(lines)


def gather_facts() -> dict[str, str]:
    """Return what was run on.

    Raises:
        SystemExit: where torch sees no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(
            f"{sys.executable}: torch {torch.__version__} sees no GPU; this command is for machines with one"
        )
    free, total = torch.cuda.mem_get_info()
    if free < 0.9 * total:
        print(f"warning: {(total - free) / 2**30:.1f} GiB of the GPU are in use by something else", flush=True)
    facts = {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "card": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {total / 2**30:.0f} GiB",
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "CUDA of torch": str(torch.version.cuda),
        "python": platform.python_version(),
        "commit": said("git", "describe", "--always", "--dirty"),
    }
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def said(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def added(results: str, run: str) -> str:
    """Return the file's text with another run, before the others.

    Raises:
        SystemExit: where the heading is not there.
    """
    before, heading, after = results.partition(RUNS)
    if not heading:
        raise SystemExit(f"the results have no heading {RUNS.strip()!r} to put a run under")
    return f"{before}{heading}\n{run}{after}"


def record(results: Path, run: str) -> None:
    """Add a run to the file, or print it where the disk is full: what the file holds already stays."""
    beside = results.with_suffix(".new")
    try:
        beside.write_text(added(results.read_text(), run))
        beside.replace(results)
    except OSError as error:
        print(f"{results} could not be written ({error}); this was to go there:\n\n{run}", flush=True)
        return
    print(f"{results}: the run is there", flush=True)


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: docs/gpu-results.md")
    arguments = parser.parse_args()
    facts = gather_facts()
    added(arguments.results.read_text(), "")
    outcomes: list[Outcome] = []
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has SIGHUP ignored
            signal.signal(number, _stop)
    try:
        outcomes.extend(run(step) for step in SUITES[arguments.suite])
    finally:
        # Also what there is when somebody stops it: minutes of a GPU are not measured twice.
        record(arguments.results, section(f"`gpu_report {arguments.suite}`", outcomes, facts))
    failed = [outcome.step.title for outcome in outcomes if outcome.exit_code != 0]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
