"""In which order a run starts its parts, and which it needs, with stand-ins for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_megatron import config_file, train
from dapo_megatron.errors import DapoError
from dapo_megatron.heartbeat import Peers
from dapo_megatron.obs.observer import NullObserver
from dapo_megatron.state import Kept
from dapo_megatron.stop import Stop
from tests.helpers.checkpoint import values


class StartedError(Exception):
    """All parts are there."""


class FollowedPeers(Peers):
    """`started`: whether the leader has, before actors are built."""

    def __init__(self, happened: list[str], started: bool) -> None:
        self.happened, self.started = happened, started

    def leader_says(self, what: str, value: Any = None) -> Any:
        if what == "start of the engines":
            self.happened.append("leader has started them")
            return self.started
        return value


def run(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    on_leader: bool,
    steps: tuple[int, int],
    problem: str | None = None,
    **sections: Any,
) -> Any:
    """Have stand-ins train until an engine is to take weights. Returns what happened.

    Args:
        steps: that are done by the newest checkpoint, and by the one that can be read; train.steps is 1.
        problem: why the last checkpoint cannot be written.
    """
    happened: list[str] = []

    def noting(what: str) -> Any:
        return lambda *_, **__: happened.append(what)

    def start(*_: Any, **__: Any) -> None:
        happened.append("publisher")
        raise StartedError

    class Checkpoints:
        last = "the last one"

        def __init__(self, config: Any, topo: Any, actor: Any, hf: Any, state: Any, *_: Any) -> None:
            self.state = state

        def restore(self) -> None:
            self.state.steps_done.value = steps[1]

        def save(self, *_: Any, **__: Any) -> None: ...

        def finish(self) -> str | None:
            return problem

        def point_to_best(self) -> None: ...

    @contextmanager
    def away() -> Iterator[None]:
        happened.append("actor away")
        yield
        happened.append("actor back")

    config = config_file.parse(values(folder) | sections)
    engines = SimpleNamespace(wait_ready=noting("engines ready"), sleep=noting("asleep"), address="127.0.0.1")
    leader = SimpleNamespace(
        config=config, engines=engines, close=noting("closed"), finish=noting("finished"), state={}, best=None
    )
    actor = SimpleNamespace(chunks=[], away=away)
    hf = SimpleNamespace(save=noting("hf"), inventory=None, write_side_files=None)
    monkeypatch.setattr(train, "Leader", lambda *_: leader)
    monkeypatch.setattr(train, "HfCheckpoint", lambda *_, **__: hf)
    monkeypatch.setattr(train, "Actor", lambda *_, **__: (happened.append("actor"), actor)[1])
    monkeypatch.setattr(train, "SkippedUpdates", lambda *_: SimpleNamespace(in_a_row=Kept(int, 0)))
    monkeypatch.setattr(train, "Checkpoints", Checkpoints)
    monkeypatch.setattr(train, "open_publisher", start)
    checked: Any = SimpleNamespace(steps_done=steps[0]) if on_leader else None
    topo: Any = SimpleNamespace()
    peers = FollowedPeers(happened, config.engine.placement == "colocated" and config.samples_after(steps[0]))
    try:
        with ExitStack() as opened:
            train.train(config, topo, peers, NullObserver(), checked, opened, Stop())
    except StartedError:
        pass
    except DapoError as error:
        happened.append(str(error))
    return [what for what in happened if what != "closed"]


@pytest.mark.parametrize(
    ("placement", "on_leader", "expected"),
    [
        ("split", True, ["leader has started them", "actor", "engines ready", "publisher"]),
        ("split", False, ["leader has started them", "actor", "publisher"]),
        ("colocated", True, ["engines ready", "asleep", "leader has started them", "actor", "publisher"]),
        ("colocated", False, ["leader has started them", "actor", "publisher"]),
    ],
)
def test_no_rank_takes_gpu_memory_before_the_engines_that_share_it_have_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: str, on_leader: bool, expected: list[str]
) -> None:
    assert run(monkeypatch, tmp_path, on_leader, (0, 0), engine={"placement": placement}) == expected


STARTED, READY = "leader has started them", "engines ready"


@pytest.mark.parametrize(
    ("placement", "steps", "evaluates", "expected"),
    [
        ("split", (1, 1), False, [STARTED, "actor", "hf", "finished"]),
        ("split", (1, 1), True, [STARTED, "actor", READY, "publisher"]),
        # The newest checkpoint is broken, and the one before is taken.
        ("split", (1, 0), False, [STARTED, "actor", READY, "publisher"]),
        ("colocated", (1, 1), False, [STARTED, "actor", "hf", "finished"]),
        ("colocated", (1, 1), True, [READY, "asleep", STARTED, "actor", "publisher"]),
        (
            *("colocated", (1, 0), False),
            [STARTED, "actor", "actor away", READY, "asleep", "actor back", "publisher"],
        ),
    ],
)
def test_where_nothing_is_left_to_sample_no_engine_is_waited_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    placement: str,
    steps: tuple[int, int],
    evaluates: bool,
    expected: list[str],
) -> None:
    sections: dict[str, Any] = {"engine": {"placement": placement}} | ({} if evaluates else {"eval": {}})
    assert run(monkeypatch, tmp_path, True, steps, **sections) == expected


def test_engines_that_keep_their_share_are_not_put_to_sleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = {"placement": "colocated", "sleep": False}
    assert run(monkeypatch, tmp_path, True, (1, 0), engine=engine, eval={}) == [STARTED, "actor", READY, "publisher"]


def test_a_policy_is_saved_also_where_its_checkpoint_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = "checkpoint of step 1 could not be written: no space"
    *before, told = run(monkeypatch, tmp_path / "saved", True, (1, 1), problem=full, eval={})
    assert before == [STARTED, "actor", "hf"]
    assert told.startswith(f"{full}. The trained policy is in ") and told.endswith("/hf")
    without = values(tmp_path / "settings")["run"] | {"save_hf": False}
    happened = run(monkeypatch, tmp_path / "not", True, (1, 1), problem=full, eval={}, run=without)
    assert happened == [STARTED, "actor", full]
