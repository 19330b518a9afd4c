from __future__ import annotations

from typing import Any

import pytest

from dapo_megatron.rollout import books as module
from dapo_megatron.rollout.books import Books


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_it_says_who_is_waited_for_and_how_long(clock: list[float]) -> None:
    books = Books(2)
    assert books.waits() == ""
    with books.asked("a") as first, books.asked("b") as second:
        first.engine = 1
        clock[0] += 7
        with books.asked("c") as third:
            second.engine, third.engine = 0, 1
            clock[0] += 5
            with books.asked("d"):
                assert books.waits() == (
                    "engine 0 with 1 prompts (the oldest, b, for 12 s), engine 1 with 2 prompts (the oldest, a, "
                    "for 12 s), 1 prompts for an engine"
                )
        second.engine = None  # it failed
        assert books.waits() == "engine 1 with 1 prompts (the oldest, a, for 12 s), 1 prompts for an engine"
    assert books.waits() == ""


def test_a_request_that_fails_is_not_waited_for() -> None:
    books = Books(1)
    with pytest.raises(ValueError, match="x"), books.asked("a"):
        raise ValueError("x")
    assert books.waits() == ""


def test_it_counts_what_single_engines_wrote(clock: list[float]) -> None:
    books = Books(2)
    with books.sampling():
        books.wrote(0, 30)
        books.wrote(1, 10)
        books.wrote(0, 10)
        clock[0] += 4
    books.restarted()
    assert values(books.take()) == {
        "engine/restarts": 1,
        "engine/tokens_per_second_min": 2.5,
        "engine/tokens_per_second_max": 10,
    }
    assert set(values(books.take()).values()) == {0}


def values(measures: Any) -> dict[str, float]:
    return {name: measure.value for name, measure in measures.items()}
