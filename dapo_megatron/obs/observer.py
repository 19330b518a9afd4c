"""What the loop talks to about its progress."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import asdict
from threading import Event, Thread
from typing import Any, Protocol

from pydantic import TypeAdapter
from rich.text import Text

from dapo_megatron.config import HELD_OUT, Config, HeldOut
from dapo_megatron.errors import ConfigError
from dapo_megatron.obs.display import open_display
from dapo_megatron.obs.memory import PeakMemory
from dapo_megatron.obs.metrics import PHASES
from dapo_megatron.obs.place import ROLLOUTS, Place, go_back, sizes, steps_in
from dapo_megatron.obs.rollouts import RolloutWriter
from dapo_megatron.obs.run_folder import LOG, open_run_folder
from dapo_megatron.obs.sinks import Sink, Tried, open_sinks
from dapo_megatron.obs.terminal import Diverted, printable
from dapo_megatron.state import Stateful
from dapo_megatron.types import Decode, Group

SHOWN_CHARACTERS = 400
"""How much of an example response is shown on the terminal."""
_REMIND_SECONDS = 60.0
_IN_ONE_GO = (("logprobs", "update"), ("offload", "wake", "publish", "sleep"))
"""Phases between which a run does not stop."""


class Example(Protocol):
    @property
    def prompt(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def response(self) -> str: ...
    @property
    def correct(self) -> bool: ...


class Evaluation(Protocol):
    """What is shown of an evaluation (`eval.evaluate.EvalResult`)."""

    @property
    def accuracy(self) -> float: ...
    @property
    def interval(self) -> tuple[float, float]: ...
    @property
    def mean_length(self) -> float: ...
    @property
    def truncated(self) -> float: ...
    @property
    def samples(self) -> int: ...
    @property
    def pass_at_k(self) -> Mapping[int, float]: ...
    @property
    def majority_at_k(self) -> float: ...
    @property
    def examples(self) -> Sequence[Example]: ...


Evaluations = Mapping[str, Mapping[str, Evaluation]]
"""Set of held-out prompts -> when -> what it came to."""


class Observer(Stateful, Protocol):
    """Its state is the place that the record has come to: loaded before `begin`, it goes on there."""

    @property
    def memory(self) -> PeakMemory:
        """What the phases of the step took at their peak on this rank."""
        ...

    def begin(self) -> None:
        """Open the record. Called once, when it is known where it goes on and before there is anything to record."""
        ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Measure and show what goes on inside. The phases of a step (`metrics.PHASES`) count towards its time."""
        ...

    def step(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        """Step number `step`, counted from 0, is done; it trained on `groups`."""
        ...

    def evaluation(self, when: str, its: HeldOut, result: Evaluation) -> None:
        """A set of held-out prompts was measured; `when` is "before", "after", or whatever is to be shown."""
        ...

    def message(self, text: str) -> None: ...

    def ask_what_is_waited_for(self, waits: Callable[[], str]) -> None:
        """Show what `waits` says, "" for nothing, in phases that take long. It is called on another thread."""
        ...

    def summary(self, values: Mapping[str, float | int | str], evaluations: Evaluations) -> None:
        """The run is over; `values` go to summary.json, with its lives and the seconds that it took.

        Args:
            evaluations: set -> when -> result. Those of "before" and "after" are shown once more, with examples.
        """
        ...

    def close(self) -> None: ...


class NullObserver:
    """For ranks other than the leader: measures memory, and shows nothing."""

    def __init__(self) -> None:
        self.memory = PeakMemory()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...

    def begin(self) -> None: ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        return self.memory.phase(name)

    def step(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None: ...

    def evaluation(self, when: str, its: HeldOut, result: Evaluation) -> None: ...

    def message(self, text: str) -> None: ...

    def ask_what_is_waited_for(self, waits: Callable[[], str]) -> None: ...

    def summary(self, values: Mapping[str, float | int | str], evaluations: Evaluations) -> None: ...

    def close(self) -> None: ...


class RunObserver:
    """Keeps the record of a run in its folder and shows it.

    While it is open, standard output and error of this process go to log.txt: what libraries say does not disturb the
    display. Warnings of this package are shown as well.

    The record of a new folder begins at once. Where a run goes on, nothing in the folder changes before `begin`, which
    takes the record back to the place that was loaded, or to nothing without one: what was written later is made again.

    Args:
        decode: makes the texts of rollouts.jsonl.

    Raises:
        ConfigError: where the folder cannot be opened, or a sink; `begin` raises it as well.
    """

    def __init__(self, config: Config, decode: Decode) -> None:
        self.memory = PeakMemory()
        self._config = config
        self._started = time.monotonic()
        self._loaded: Place | None = None
        """Where the record goes on, where a checkpoint says so."""
        self._begun = self._warned_of_signals = False
        self._sinks: dict[str, Sink] = {}
        self._done = 0
        self._seconds: dict[str, float] = {}
        self._waits: Callable[[], str] = str
        self._step_started = 0.0
        self._eval_seconds = 0.0
        self._writing_rollouts = Tried(ROLLOUTS, OSError)
        self._writing_summary = Tried("summary.json", OSError)
        with ExitStack() as stack:
            self._folder = stack.enter_context(closing(open_run_folder(config)))
            self._output = stack.enter_context(closing(Diverted(self._folder.path / LOG)))
            self._shown = stack.enter_context(ExitStack())
            display = open_display(self._output.terminal, config.run.name, config.train.steps)
            self._display = self._shown.enter_context(closing(display))
            relay = _Relay(self._display.show)
            logging.getLogger("dapo_megatron").addHandler(relay)
            self._shown.callback(logging.getLogger("dapo_megatron").removeHandler, relay)
            rollouts = self._folder.path / ROLLOUTS
            self._rollouts = RolloutWriter(rollouts, config.run.sampled_groups, decode)
            self._sinks_open = stack.enter_context(ExitStack())
            if not self._folder.resumed:
                self.begin()
            self._open = stack.pop_all()
        self.message(f"{self._folder.path}: metrics, responses and {LOG} of this run")
        for note in self._folder.notes:
            self.message(note)

    def state_dict(self) -> dict[str, Any]:
        """
        Raises:
            OSError: where what is written so far does not reach the disk.
        """
        places = {name: sink.place for name, sink in self._sinks.items()}
        return asdict(Place(self._done, self._seconds_so_far(), sizes(self._folder.path), places))

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self._loaded = TypeAdapter(Place).validate_python(state)

    def begin(self) -> None:
        if self._begun:
            return
        folder, place = self._folder, self._loaded or Place()
        try:
            if folder.resumed and not self._loaded and self._had_checkpoints():
                raise ConfigError(
                    f"run: the record in {folder.path} goes past the first checkpoint, and there is none: is the "
                    f"storage of {folder.path / 'checkpoints'} there? To begin anew, start with run.existing=rename"
                )
            if folder.resumed:
                go_back(folder.path, place.files)
                folder.go_on(place.steps)
        except OSError as error:
            raise ConfigError(f"run: cannot go on with the record in {folder.path}: {error}") from error
        self._sinks = open_sinks(self._config, folder.path, self._loaded)
        for sink in self._sinks.values():
            self._sinks_open.enter_context(closing(sink))
        self._done = place.steps
        self._display.go_on(place.steps)
        self._begun = True
        if folder.resumed:
            where = f"goes on after step {place.steps}" if self._loaded else "has no checkpoint yet: it begins again"
            self.message(f"resumed: the run {where}")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        if name in PHASES and not self._seconds:
            self._step_started = started
        self._display.begin(name)
        with self.memory.phase(name), self._reminded(name):
            yield
        seconds = time.monotonic() - started
        self._output.note(f"phase {printable(name)}: {seconds:.3f} s")
        self._display.end(name, seconds)
        if name in PHASES:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        else:
            self._eval_seconds = seconds
            self._step_started += seconds  # an evaluation in the middle of a step is none of it

    @contextmanager
    def _reminded(self, phase: str) -> Iterator[None]:
        """Say every minute what a phase waits for."""
        over, started = Event(), time.monotonic()

        def remind() -> None:
            while not over.wait(_REMIND_SECONDS):
                if waits := self._waits():
                    text = f"{phase}, for {time.monotonic() - started:.0f} s, waits for {waits}"
                    self._output.note(printable(text))
                    self._display.remind(text)

        thread = Thread(target=remind, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def step(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        self._done = step + 1
        row = {
            **metrics,
            **{f"seconds/{name}": seconds for name, seconds in self._seconds.items()},
            "seconds/step": time.monotonic() - self._step_started if self._seconds else 0.0,
        }
        self._warn_of_signals()
        self._seconds = {}
        self._log(row)
        with self._writing_rollouts(f"write the responses of step {self._done}"):
            self._rollouts.write(self._done, groups)
        self._display.step(self._done, row)

    def evaluation(self, when: str, its: HeldOut, result: Evaluation) -> None:
        low, high = result.interval
        values = {
            "accuracy": result.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "pass_at_k": result.pass_at_k[result.samples],
            "majority_at_k": result.majority_at_k,
            "response_length": result.mean_length,
            "truncated": result.truncated,
            "seconds": self._eval_seconds,
        }
        self._log({f"{its.metrics}{name}": value for name, value in values.items()})
        self.message(f"{its.name}, {when}: {_result(result)}")

    def message(self, text: str) -> None:
        self._output.note(printable(text))
        self._display.show(text)

    def ask_what_is_waited_for(self, waits: Callable[[], str]) -> None:
        self._waits = waits
        self._display.ask_what_is_waited_for(waits)

    def summary(self, values: Mapping[str, float | int | str], evaluations: Evaluations) -> None:
        with self._writing_summary("write it"):
            seconds = {
                "seconds": self._seconds_so_far(),
                "seconds_last_life": time.monotonic() - self._started,
                **self._folder.lives,
            }
            self._folder.summarise({**{name: round(value, 1) for name, value in seconds.items()}, **values})
        whens = ("before", "after")
        ends = [(name, when, its[when]) for name, its in evaluations.items() for when in whens if when in its]
        text = Text()
        for name, when, result in ends:
            text.append(f"\n{'' if name == HELD_OUT else f'{name}, '}{when} training\n", style="bold")
            for example in result.examples:
                text.append_text(_shown(example))
        for name, when, result in ends:
            text.append(f"\n{name}, {when}: {_result(result)}", style="bold")
        if ends:
            self._output.note(text.plain)
            self._display.show(text)
        self.message(f"summary: {self._folder.path / 'summary.json'}")

    def last_words(self, text: str) -> None:
        """Take the display off the terminal and print `text`, the last that is seen of this run."""
        with suppress(OSError):
            self._shown.close()
        self._output.last_words(text)

    def ask_again(self) -> None:
        """Leave word that the run is to be started again.

        Raises:
            OSError: where it cannot be written.
        """
        self._folder.ask_again()

    def close(self) -> None:
        """Close files and give the terminal back. Safe to call twice."""
        self._open.close()

    def _log(self, row: Mapping[str, float]) -> None:
        assert self._begun, "nothing is recorded before begin()"
        for sink in self._sinks.values():
            sink.log(self._done, row)

    def _warn_of_signals(self) -> None:
        """Say once that a run that is asked to stop in the middle of a step like this one would not come to save."""
        limit = self._config.checkpoint.signal_seconds
        seconds = max(sum(self._seconds.get(name, 0.0) for name in names) for names in _IN_ONE_GO)
        if seconds > limit and not self._warned_of_signals:
            self._warned_of_signals = True
            self.message(
                f"warning: log-probs and updates, or the push of weights, took {seconds:.0f} s. A run that is asked to "
                f"stop meanwhile saves after them, and has checkpoint.signal_seconds={limit:g} for all; let it have "
                f"more, and more from the scheduler"
            )

    def _had_checkpoints(self) -> bool:
        """Whether the record goes so far that there must have been one."""
        every = self._config.checkpoint.every
        return every > 0 and steps_in(self._folder.path) > every

    def _seconds_so_far(self) -> float:
        earlier = self._loaded.seconds if self._loaded else 0.0
        return earlier + time.monotonic() - self._started


class _Relay(logging.Handler):
    """Shows warnings of this package, which are meant for the person who runs it."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record.getMessage())


def _result(result: Evaluation) -> str:
    low, high = result.interval
    return (
        f"accuracy {result.accuracy:.1%} (95% interval {low:.1%} to {high:.1%}), mean length "
        f"{result.mean_length:.1f} tokens, {result.truncated:.1%} truncated"
    )


def _shown(example: Example) -> Text:
    """Prompt and response on lines of their own, the response indented."""
    mark, style = ("right", "green") if example.correct else ("wrong", "red")
    text = Text(f"  {printable(example.prompt, SHOWN_CHARACTERS)}  ")
    text.append(f"{mark}, {printable(example.answer, SHOWN_CHARACTERS)} expected\n", style=style)
    for line in printable(example.response, SHOWN_CHARACTERS).split("\n"):
        text.append(f"    {line}\n", style="dim")
    return text
