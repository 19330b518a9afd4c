"""In which order a run starts its parts, with stand-ins for them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_megatron import config_file, train
from dapo_megatron.obs.observer import NullObserver
from dapo_megatron.stop import Stop
from tests.helpers.checkpoint import values


class StartedError(Exception):
    """All parts are there."""


@pytest.mark.parametrize(
    ("placement", "on_the_leader", "elsewhere"),
    [
        ("split", ["leader has started them", "actor", "engines ready"], ["leader has started them", "actor"]),
        (
            "colocated",
            ["engines ready", "leader has started them", "actor", "engines ready"],
            ["leader has started them", "actor"],
        ),
    ],
)
def test_no_rank_takes_gpu_memory_before_the_engines_that_share_it_have_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: str, on_the_leader: list[str], elsewhere: list[str]
) -> None:
    happened: list[str] = []
    engines = SimpleNamespace(wait_ready=lambda: happened.append("engines ready"))
    leader = SimpleNamespace(engines=engines, close=lambda: None)

    def after_leader(what: str) -> None:
        assert what == "start of the engines"
        happened.append("leader has started them")

    def start(*_: Any) -> None:
        raise StartedError

    monkeypatch.setattr(train, "Leader", lambda *_: leader)
    monkeypatch.setattr(train, "HfCheckpoint", lambda *_, **__: None)
    monkeypatch.setattr(train, "Actor", lambda *_, **__: happened.append("actor"))
    monkeypatch.setattr(train, "SkippedUpdates", lambda *_: None)
    monkeypatch.setattr(train, "open_publisher", start)
    config = config_file.parse(values(tmp_path) | {"engine": {"placement": placement}})
    peers = SimpleNamespace(after_leader=after_leader, together=lambda what: None)
    checked, topo = SimpleNamespace(), SimpleNamespace()
    for given, expected in ((checked, on_the_leader), (None, elsewhere)):
        happened.clear()
        with pytest.raises(StartedError), ExitStack() as opened:
            train.train(config, topo, peers, NullObserver(), given, opened, Stop())  # pyright: ignore[reportArgumentType]
        assert happened == expected
