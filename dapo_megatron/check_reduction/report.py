"""Prints the table of `check-reduction` while it grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dapo_megatron.check_reduction.layouts import Layout

_ROW = "{:<{width}} {:<6} {:<22} {:>7}  {:<42} {}"


@dataclass(frozen=True, slots=True)
class Finding:
    """How one mini-batch came out in one layout."""

    split: str
    micro_batches: int
    """Micro-batches of each replica."""
    error: float
    """Largest error of a parameter, in the units of `rank.Job.answers`; inf where there is no number."""
    where: str
    """The parameter, or what went wrong."""


class Report:
    """Prints rows and keeps count.

    Args:
        limit: largest relative error that passes.
        verbose: print a row for every split; else one for the worst of each layout, and for every failure.
    """

    def __init__(self, *, limit: float, verbose: bool) -> None:
        self._limit, self._verbose = limit, verbose
        self._checks = self._failures = self._largest = 0
        self._worst, self._width = 0.0, 0
        self._remarks: list[str] = []
        self._error = "relative error" if limit < 1 else "error"

    @property
    def passed(self) -> bool:
        """Whether there was a check, and all agreed."""
        return self._checks > 0 and self._failures == 0

    def say(self, text: str) -> None:
        print(text, flush=True)

    def remark(self, text: str) -> None:
        """Say `text` now, and again with the verdict."""
        self._remarks.append(text)
        self.say(text)

    def start(self, dtype: str, gpu: bool, layouts: Sequence[Layout], limit: int) -> None:
        """Say what will be shown, of which layouts; those of more than `limit` ranks are left out."""
        self._width = max(len(str(layout)) for layout in layouts)
        self.say(
            f"Each gradient, and the parameters after two updates, against Hugging Face in float64; "
            f"{dtype} on {'GPU' if gpu else 'CPU'}, {self._error} at most {self._limit:g}."
        )
        if dtype == "bfloat16":
            sharp = f"{'CUDA_VISIBLE_DEVICES= ' if gpu else ''}dapo-megatron check-reduction ... --dtype float32"
            self.say(
                "The error is that of a parameter's norm, in units of that of Hugging Face's model in bfloat16. Only "
                f"gross mistakes show; for the sharp check: {sharp}"
            )
        if left_out := [layout for layout in layouts if layout.ranks > limit]:
            names = ", ".join(f"{layout} ({layout.ranks})" for layout in left_out)
            self.say(f"Left out, for there are {limit} processes: {names}")
        self._row("layout", "embed.", "split" if self._verbose else "worst split", "error", "worst parameter", "")

    def layout(self, layout: Layout, embeddings: str, found: Sequence[Finding]) -> None:
        """Print the findings of one layout."""
        self._largest = max(self._largest, layout.ranks)
        failed = [finding for finding in found if not finding.error <= self._limit]
        self._checks += len(found)
        self._failures += len(failed)
        self._worst = max(self._worst, *(finding.error for finding in found))
        shown = found if self._verbose else failed or [max(found, key=lambda finding: finding.error)]
        for finding in shown:
            verdict = "FAIL" if finding in failed else "PASS"
            split = f"{finding.split} ({finding.micro_batches})" if self._verbose else finding.split
            self._finding(layout, embeddings, split, finding.error, finding.where, verdict)

    def failure(self, layout: Layout, embeddings: str, reason: str) -> None:
        """Print a layout that could not be measured."""
        self._largest = max(self._largest, layout.ranks)
        self._checks += 1
        self._failures += 1
        self._worst = math.inf
        self._finding(layout, embeddings, "", math.inf, "", "FAIL")
        self.say(reason)

    def end(self, seconds: float) -> None:
        """Print the verdict."""
        outcome = f"PASS: all {self._checks}" if self.passed else f"FAIL: {self._failures} of {self._checks}"
        worst = f"worst {self._error} {self._shown(self._worst)} (at most {self._limit:g})"
        self.say("\n".join([*self._remarks, f"{outcome} checks, {worst}, {seconds:.0f} s"]))
        if self._largest < 2:
            self.say("No layout of more than one rank was run: this says nothing about the reduction between ranks.")

    def _finding(self, layout: Layout, embeddings: str, split: str, error: float, where: str, verdict: str) -> None:
        name, long = where.replace("model.layers.", "layers."), ""
        if len(name) > 42:
            name, long = "see below", where
        self._row(str(layout), embeddings, split, self._shown(error), name, verdict)
        if long:
            self.say(f"    {long}")

    def _row(self, *cells: str) -> None:
        self.say(_ROW.format(*cells, width=self._width).rstrip())

    def _shown(self, error: float) -> str:
        return "exact" if error == 0 else f"{error:.1e}" if self._limit < 1 else f"{error:.2f}"
