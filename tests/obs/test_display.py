from __future__ import annotations

import io
import logging
import math

import pytest
from rich.console import Console

from dapo_megatron.obs.display import LiveDisplay, Pace, PlainDisplay, clock, facts, open_display, sparkline
from dapo_megatron.obs.observer import _Relay

METRICS = {
    "accuracy": 0.25,
    "reward": -0.5,
    "response_length": 21.54,
    "entropy": 0.5,
    "clip/high": 0.004,
    "clip/low": 0.001,
    "groups/kept": 32.0,
    "groups/all_right": 3.0,
    "groups/all_wrong": 20.0,
    "tokens_per_second": 4812.3,
    "seconds/rollout": 1.25,
    "seconds/logprobs": 0.25,
    "seconds/update": 0.75,
    "seconds/publish": 0.125,
    "seconds/step": 2.5,
}


def test_plain_display_is_one_line_per_step() -> None:
    file = io.StringIO()
    display = PlainDisplay(file, steps=25)
    display.begin("starting engines")
    display.end("starting engines", 12.34)
    display.begin("rollout")
    display.end("rollout", 1.25)
    display.step(7, METRICS)
    display.show("model says \x1b[31m [bold]red[/bold]")
    assert file.getvalue().splitlines() == [
        "starting engines ...",
        "starting engines: 12.3 s",
        "step 7/25  accuracy 0.250  reward -0.500  length 21.5  entropy 0.500  clipped 0.40% high, 0.10% low  "
        "groups 32 kept, 3 all right, 20 all wrong  tokens/s 4,812  2.5 s  left 0:45",
        r"model says \x1b[31m [bold]red[/bold]",
    ]


class Full(io.StringIO):
    """A file on a disk that is full for a while."""

    full = True

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write(text)


@pytest.mark.parametrize("terminal", [False, True])
def test_where_nothing_can_be_shown_the_log_says_so_once(terminal: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Also where its warnings are shown in the same place."""
    file = Full()
    file.full = not terminal  # a live display begins on a terminal that works
    console = Console(file=file, force_terminal=True, width=100)
    display = LiveDisplay(console, "quick", 25) if terminal else PlainDisplay(file, 25)
    file.full = True
    relay = _Relay(display.show)
    logging.getLogger("dapo_megatron").addHandler(relay)
    try:
        for _ in range(3):
            display.show("hello")
        file.full = False
        display.show("again")
    finally:
        logging.getLogger("dapo_megatron").removeHandler(relay)
        display.close()
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("standard output: could not print (OSError: [Errno 28] No space left on device); the run")
    assert "again" in file.getvalue()


def live(steps: int = 25) -> tuple[LiveDisplay, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, color_system=None, highlight=False)
    return LiveDisplay(console, "quick", steps), file


def test_live_display_shows_where_the_run_is() -> None:
    display, file = live()
    display.step(6, {**METRICS, "accuracy": 0.125})
    display.step(7, METRICS)
    display.ask_what_is_waited_for(lambda: "engine 3\x1b[2J")
    display.begin("rollout")
    display.close()
    last = file.getvalue()[file.getvalue().rindex("quick") :]
    assert "\x1b[2J" not in last
    for shown in (
        "step 7/25",
        "rollout  0 s",
        "waits for  engine 3",
        "0.250",
        "▁█",
        "32 kept",
        "4,812",
        "2.50 s",
        "update 0.75",
        "left",
    ):
        assert shown in last


def test_live_display_begins_where_a_run_goes_on() -> None:
    display, file = live()
    display.go_on(6)
    display.close()
    last = file.getvalue()[file.getvalue().rindex("quick") :]
    assert "step 6/25" in last and "left" not in last  # before a step of this life, nobody knows how long they take


def test_live_display_obeys_no_model_text() -> None:
    display, file = live()
    display.show("\x1b[2J\x1b]0;owned\x07 [bold]x[/bold] [/]")
    display.begin("evaluating [/] \x1b[2J")
    display.close()
    output = file.getvalue()
    assert "\x1b[2J" not in output
    assert "\x1b]" not in output
    assert r"\x1b[2J\x1b]0;owned\x07 [bold]x[/bold] [/]" in output


def test_a_file_is_no_terminal() -> None:
    assert isinstance(open_display(io.StringIO(), "quick", 1), PlainDisplay)


def test_what_was_not_measured_is_left_out() -> None:
    assert facts({"accuracy": 0.5, "clip/high": 0.1}) == {"accuracy": "0.500"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], ""), ([1.0], "▁"), ([0.0, 1.0], "▁█"), ([2.0, 2.0], "▁▁"), ([0.0, math.nan, 7.0, 4.0], "▁ █▅")],
)
def test_sparkline(values: list[float], expected: str) -> None:
    assert sparkline(values) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0:00"), (65.4, "1:05"), (3600, "1:00:00"), (7325, "2:02:05"), (math.nan, "-")]
)
def test_clock(seconds: float, expected: str) -> None:
    assert clock(seconds) == expected


def test_pace() -> None:
    pace = Pace(steps=10)
    assert pace.left(1, 2.0) == 18.0
    for now in (0.0, 3.0, 6.0):
        pace.tick(now)
    assert pace.left(4, 2.0) == 18.0
    assert pace.left(10, 2.0) == 0
