"""Shows a run while it goes: a live panel on a terminal, one line per step elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dapo_megatron.obs.metrics import PHASES
from dapo_megatron.obs.sinks import Tried
from dapo_megatron.obs.terminal import printable

BARS = "▁▂▃▄▅▆▇█"
_TREND_STEPS = 40
_PACE_STEPS = 10


class Display(Protocol):
    def go_on(self, done: int) -> None:
        """The run begins with `done` steps done, in an earlier life."""
        ...

    def begin(self, phase: str) -> None: ...

    def end(self, phase: str, seconds: float) -> None: ...

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        """`done` steps are done; `metrics` are those of the last."""
        ...

    def ask_what_is_waited_for(self, waits: Callable[[], str]) -> None:
        """Show what `waits` says, where there is a place for it."""
        ...

    def remind(self, text: str) -> None:
        """A phase takes long; `text` says what it waits for."""
        ...

    def show(self, text: str | Text) -> None:
        """Print a paragraph. Plain text is made printable first; pieces of a Text must be already."""
        ...

    def close(self) -> None: ...


def open_display(file: TextIO, name: str, steps: int) -> Display:
    """A live display where `file` is a terminal."""
    console = Console(file=file, highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal
    return LiveDisplay(console, name, steps) if live else PlainDisplay(file, steps)


class Pace:
    """How long the rest takes, judged by the last steps, evaluations between them included."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._times: list[float] = []

    def tick(self, now: float) -> None:
        """A step was done at `now`, in seconds."""
        self._times = [*self._times, now][-_PACE_STEPS - 1 :]

    def left(self, done: int, seconds: float) -> float:
        """Seconds, given that the last step took `seconds`."""
        times = self._times
        each = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else seconds
        return max(0, self._steps - done) * each


class PlainDisplay:
    """One line per step, and one for everything else that is worth waiting for."""

    def __init__(self, file: TextIO, steps: int) -> None:
        self._file, self._steps, self._pace = file, steps, Pace(steps)
        self._printing = Tried("standard output", OSError)

    def go_on(self, done: int) -> None: ...

    def begin(self, phase: str) -> None:
        if phase not in PHASES:
            self.show(f"{phase} ...")

    def end(self, phase: str, seconds: float) -> None:
        if phase not in PHASES:
            self.show(f"{phase}: {seconds:.1f} s")

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        seconds = metrics.get("seconds/step", math.nan)
        self._pace.tick(time.monotonic())
        parts = [f"{name} {value}" for name, value in facts(metrics).items()]
        left = clock(self._pace.left(done, seconds))
        self.show("  ".join([f"step {done}/{self._steps}", *parts, f"{seconds:.1f} s", f"left {left}"]))

    def ask_what_is_waited_for(self, waits: Callable[[], str]) -> None: ...

    def remind(self, text: str) -> None:
        self.show(text)

    def show(self, text: str | Text) -> None:
        # A log on a full disk, a terminal that went away: the run goes on without it.
        with self._printing("print"):
            print(text.plain if isinstance(text, Text) else printable(text), file=self._file, flush=True)

    def close(self) -> None:
        with suppress(OSError):
            self._file.flush()


class LiveDisplay:
    """A panel at the bottom of the terminal; paragraphs scroll away above it."""

    def __init__(self, console: Console, name: str, steps: int) -> None:
        self._console, self._name, self._steps, self._pace = console, printable(name), steps, Pace(steps)
        self._started = time.monotonic()
        self._phase: tuple[str, float] | None = None
        self._done = 0
        self._metrics: Mapping[str, float] = {}
        self._trends: dict[str, list[float]] = {}
        self._waits: Callable[[], str] = str
        self._printing = Tried("standard output", OSError)
        # Standard output and error are diverted by then; rich must not put itself in between.
        self._live = Live(
            get_renderable=self._panel,
            console=console,
            refresh_per_second=2,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def go_on(self, done: int) -> None:
        self._done = done

    def begin(self, phase: str) -> None:
        self._phase = phase, time.monotonic()

    def end(self, phase: str, seconds: float) -> None:
        self._phase = None
        if phase not in PHASES:
            self.show(f"{phase}: {seconds:.1f} s")

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        self._done, self._metrics = done, dict(metrics)
        self._pace.tick(time.monotonic())
        for name in ("accuracy", "reward", "response_length", "entropy"):
            if name in metrics:
                self._trends[name] = [*self._trends.get(name, []), metrics[name]][-_TREND_STEPS:]

    def ask_what_is_waited_for(self, waits: Callable[[], str]) -> None:
        self._waits = waits

    def remind(self, text: str) -> None:
        """The panel says it all the time."""

    def show(self, text: str | Text) -> None:
        with self._printing("print"):
            self._console.print(Text(printable(text)) if isinstance(text, str) else text)

    def close(self) -> None:
        with suppress(OSError):
            self._live.stop()

    def _panel(self) -> RenderableType:
        metrics, now = self._metrics, time.monotonic()
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim")
        rows.add_column()
        if running := self._phase:
            phase, since = running
            rows.add_row("now", Text(f"{printable(phase)}  {now - since:.0f} s"))
            if waits := self._waits():
                rows.add_row("waits for", Text(printable(waits)))
        for name, value in facts(metrics).items():
            trend = self._trends.get("response_length" if name == "length" else name)
            rows.add_row(name, Text(f"{value:<8}").append(sparkline(trend), style="cyan") if trend else Text(value))
        if "seconds/step" in metrics:
            parts = _by_phase(metrics, "seconds", "{:.2f}")
            rows.add_row("last step", Text(f"{metrics['seconds/step']:.2f} s  ({parts})"))
        if parts := _by_phase(metrics, "memory", "{:.1f}"):
            rows.add_row("peak GiB", Text(parts))
        left = ""
        if self._done and "seconds/step" in metrics:
            left = f"  {clock(self._pace.left(self._done, metrics.get('seconds/step', 0)))} left"
        title = f"{self._name}  step {self._done}/{self._steps}  {clock(now - self._started)}{left}"
        return Panel(Group(rows), title=Text(title, style="bold"), title_align="left", expand=False)


def facts(metrics: Mapping[str, float]) -> dict[str, str]:
    """What both displays show of a step, spelled; what was not measured is left out."""
    found = {
        "accuracy": _spell(metrics, "{accuracy:.3f}"),
        "reward": _spell(metrics, "{reward:.3f}"),
        "length": _spell(metrics, "{response_length:.1f}"),
        "entropy": _spell(metrics, "{entropy:.3f}"),
        "clipped": _spell(metrics, "{clip/high:.2%} high, {clip/low:.2%} low"),
        "groups": _spell(
            metrics, "{groups/kept:.0f} kept, {groups/all_right:.0f} all right, {groups/all_wrong:.0f} all wrong"
        ),
        "tokens/s": _spell(metrics, "{tokens_per_second:,.0f}"),
    }
    return {name: value for name, value in found.items() if value}


def _by_phase(metrics: Mapping[str, float], kind: str, form: str) -> str:
    found = {phase: metrics[name] for phase in PHASES if (name := f"{kind}/{phase}") in metrics}
    return ", ".join(f"{phase} {form.format(value)}" for phase, value in found.items())


def _spell(metrics: Mapping[str, float], template: str) -> str:
    try:
        return template.format_map(metrics)
    except KeyError:
        return ""


def sparkline(values: list[float]) -> str:
    """One bar per value from the smallest to the largest; a blank for nan. Equal values are all lowest."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low, high = min(finite), max(finite)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values)


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 2:05, 1:00:00. A dash for nan."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
