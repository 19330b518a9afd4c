"""The table of `check-reduction`, printed while it grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from dapo_megatron.check_reduction.layouts import Layout


class Finding(Protocol):
    """`rank.Finding`."""

    @property
    def split(self) -> str: ...
    @property
    def micro_batches(self) -> int: ...
    @property
    def error(self) -> float: ...
    @property
    def where(self) -> str: ...


_ROW = "{:<29} {:<6} {:<18} {:>7}  {:<42} {}"


class Report:
    """Prints rows and keeps count.

    Args:
        limit: largest relative error that passes.
        verbose: a row for every split; else one for the worst of each layout, and for every failure.
    """

    def __init__(self, *, limit: float, verbose: bool) -> None:
        self._limit, self._verbose = limit, verbose
        self._checks = self._failures = self._largest = 0
        self._worst = 0.0

    @property
    def passed(self) -> bool:
        """Whether there was a check, and all agreed."""
        return self._checks > 0 and self._failures == 0

    def say(self, text: str) -> None:
        print(text, flush=True)

    def start(self, dtype: str, device: str, left_out: Sequence[Layout], limit: int) -> None:
        self.say(
            f"Each gradient, and the parameters after two optimizer steps, against Hugging Face in float64; "
            f"{dtype} on {device}, relative error at most {self._limit:g}."
        )
        if dtype == "bfloat16":
            self.say(
                "In bfloat16 errors are those of a parameter's norm, and only gross ones show. For the sharp check, in "
                "float32 on CPU: CUDA_VISIBLE_DEVICES= dapo-megatron check-reduction ..."
            )
        if left_out:
            names = ", ".join(f"{layout} ({layout.ranks})" for layout in left_out)
            self.say(f"Left out, for there are {limit} processes: {names}")
        self.say(
            _ROW.format("layout", "embed.", "split" if self._verbose else "worst split", "error", "worst parameter", "")
        )

    def layout(self, layout: Layout, embeddings: str, found: Sequence[Finding]) -> None:
        """The findings of one layout."""
        self._largest = max(self._largest, layout.ranks)
        failed = [finding for finding in found if not finding.error <= self._limit]
        self._checks += len(found)
        self._failures += len(failed)
        self._worst = max(self._worst, *(finding.error for finding in found))
        shown = found if self._verbose else failed or [max(found, key=lambda finding: finding.error)]
        for finding in shown:
            verdict = "FAIL" if finding in failed else "PASS"
            split = f"{finding.split} ({finding.micro_batches})" if self._verbose else finding.split
            self._row(layout, embeddings, split, finding.error, finding.where, verdict)

    def failure(self, layout: Layout, embeddings: str, reason: str) -> None:
        """A layout that could not be measured."""
        self._checks += 1
        self._failures += 1
        self._worst = math.inf
        self._row(layout, embeddings, "", math.inf, "", "FAIL")
        self.say(reason)

    def end(self, seconds: float) -> None:
        outcome = f"PASS: all {self._checks}" if self.passed else f"FAIL: {self._failures} of {self._checks}"
        self.say(f"{outcome} checks, worst relative error {self._worst:.1e} (at most {self._limit:g}), {seconds:.0f} s")
        if self._largest < 2:
            self.say("No layout of more than one rank was run: this says nothing about the reduction between ranks.")

    def _row(self, layout: Layout, embeddings: str, split: str, error: float, where: str, verdict: str) -> None:
        name, long = where.replace("model.layers.", "layers."), ""
        if len(name) > 42:
            name, long = "see below", where
        shown = "exact" if error == 0 else f"{error:.1e}"
        self.say(_ROW.format(str(layout), embeddings, split, shown, name, verdict))
        if long:
            self.say(f"    {long}")
