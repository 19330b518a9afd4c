"""A run that is killed and goes on leaves the record of one that was never killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dapo_megatron import config_file
from dapo_megatron.config import HELD_OUT, Config
from dapo_megatron.errors import ConfigError
from dapo_megatron.obs.observer import RunObserver
from dapo_megatron.obs.place import Lines, Place, go_back, sizes
from tests.helpers.completions import read
from tests.obs.test_observer import GROUP, HELD, RESULT, rows

STEPS, EVERY = 6, 2
EVENTS = 2 + STEPS + 2
"""Evaluations before, after half of the steps and after all, and the steps; then what is said of the end."""


def config(folder: Path, **sections: dict[str, Any]) -> Config:
    run = {"dir": str(folder), "name": "test", "sampled_groups": 2, "existing": "resume", **sections.pop("run", {})}
    return config_file.parse(
        {
            "model": {"path": "x"},
            "data": {"train": "x"},
            "train": {"steps": STEPS, **sections.pop("train", {})},
            "run": run,
            **sections,
        }
    )


def live(config: Config, checkpoint: Path, events: int) -> None:
    """One life of a run: as `train` does it, with a checkpoint every EVERY steps, until `events` have happened."""
    with closing(RunObserver(config, read)) as observer:
        done, happened = 0, 0
        if checkpoint.exists():
            observer.load_state_dict(json.loads(checkpoint.read_text()))
            done = observer._loaded.steps if observer._loaded else 0
            happened = done + (done > 0) + (done > STEPS // 2)
        observer.begin()
        for event in list(all_events(observer, checkpoint))[happened:events]:
            event()


def all_events(observer: RunObserver, checkpoint: Path) -> Iterator[Callable[[], None]]:
    def step(number: int) -> None:
        uid = f"train.jsonl:{number}"
        observer.step(number, {"loss": number / 8}, [replace(GROUP, prompt=replace(GROUP.prompt, uid=uid))] * 2)
        if (number + 1) % EVERY == 0:
            checkpoint.write_text(json.dumps(observer.state_dict()))

    yield lambda: observer.evaluation("before", HELD, RESULT)
    for number in range(STEPS):
        yield lambda number=number: step(number)
        if number + 1 == STEPS // 2:
            yield lambda: observer.evaluation("half", HELD, replace(RESULT, accuracy=0.5))
    yield lambda: observer.evaluation("after", HELD, replace(RESULT, accuracy=0.75))
    yield lambda: observer.summary({"steps": STEPS}, {HELD_OUT: {"before": RESULT}})


def record(folder: Path) -> dict[str, Any]:
    """All that is kept, but times."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    timeless = [
        {name: value for name, value in row.items() if name != "time" and not name.startswith(("seconds/", "eval/sec"))}
        for row in rows(folder / "metrics.jsonl")
    ]
    return {
        "metrics": timeless,
        "rollouts": (folder / "rollouts.jsonl").read_bytes(),
        "tensorboard": {
            # Files are read in the order of their names, in which lives of one second and one process may be mixed.
            tag: sorted((event.step, event.value) for event in events.Scalars(tag))
            for tag in ("loss", "eval/accuracy", "eval/accuracy_low")
        },
        "summary": set(json.loads((folder / "summary.json").read_text())),
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    live(config(folder), folder / "checkpoint", EVENTS)
    found = record(folder / "test")
    assert [row["step"] for row in found["metrics"]] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert len(found["rollouts"].splitlines()) == 2 * STEPS
    assert found["tensorboard"]["eval/accuracy"] == [(0, 0.25), (3, 0.5), (6, 0.75)]
    return found


@pytest.mark.parametrize("killed", [*[(events,) for events in range(EVENTS)], (4, 5), (4, 8, 8), (1, 2, 9)])
def test_a_run_that_is_killed_leaves_the_same_record(
    tmp_path: Path, undisturbed: dict[str, Any], killed: tuple[int, ...]
) -> None:
    """Killed after so many events, in the middle of writing the next; more than once, also before a checkpoint."""
    for events in killed:
        live(config(tmp_path), tmp_path / "checkpoint", events)
        folder = tmp_path / "test"
        event_files = sorted((folder / "tensorboard").iterdir())
        for file, begun in ((folder / "metrics.jsonl", b'{"st'), (folder / "rollouts.jsonl", b'{"step": 9}\n{"')):
            file.write_bytes(file.read_bytes() + begun)
        event_files[-1].write_bytes(event_files[-1].read_bytes() + b"\x18\0\0")
    live(config(tmp_path), tmp_path / "checkpoint", EVENTS)
    assert record(tmp_path / "test") == undisturbed
    assert (tmp_path / "test/log.txt").read_text().count("resumed: the run") == len(killed)


def test_the_display_and_the_log_say_where_a_run_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    live(config(tmp_path), tmp_path / "checkpoint", 4)
    capfd.readouterr()
    live(config(tmp_path, train={"steps": 9}), tmp_path / "checkpoint", 4)
    shown = capfd.readouterr().out.splitlines()
    assert shown[:3] == [
        f"{tmp_path / 'test'}: metrics, responses and log.txt of this run",
        "changed: train.steps: 6 -> 9",
        "resumed: the run goes on after step 2",
    ]
    assert shown[3].startswith("step 3/9  ")
    log = (tmp_path / "test/log.txt").read_text()
    assert "\n".join(shown[:3]) in log and log.count("responses and log.txt") == 2
    (life,) = json.loads((tmp_path / "test/versions.json").read_text())["resumed"]
    assert (life["step"], life["changed"]) == (2, {"train.steps": [6, 9]})


def test_seconds_of_all_lives_are_added_up(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    live(config(tmp_path), checkpoint, 3)
    state = json.loads(checkpoint.read_text())
    assert 0 < state["seconds"] < 1e5
    checkpoint.write_text(json.dumps({**state, "seconds": 1e6}))
    live(config(tmp_path), checkpoint, EVENTS)
    assert json.loads(checkpoint.read_text())["seconds"] > 1e6
    summary = json.loads((tmp_path / "test/summary.json").read_text())
    assert 1e6 <= summary["seconds"] < 2e6
    assert summary["lives"] == 2
    assert 0 <= summary["seconds_last_life"] < 1e5


def test_what_lies_between_lives_counts_by_the_clock(tmp_path: Path) -> None:
    live(config(tmp_path), tmp_path / "checkpoint", 3)
    path = tmp_path / "test/versions.json"
    begun = datetime.now(UTC) - timedelta(hours=2)
    path.write_text(json.dumps({**json.loads(path.read_text()), "begun": begun.isoformat()}))
    live(config(tmp_path), tmp_path / "checkpoint", EVENTS)
    summary = json.loads((tmp_path / "test/summary.json").read_text())
    assert 7200 <= summary["seconds_since_begun"] < 7800 and summary["seconds"] < 600


def test_trackers_go_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    tracked = config(tmp_path, run={"mlflow_uri": str(tmp_path / "mlflow"), "tensorboard": False})
    for events in (4, EVENTS):
        live(tracked, tmp_path / "checkpoint", events)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    (run,) = client.search_runs(["0"])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [(step, (step - 1) / 8) for step in range(1, 7)]


def test_before_a_run_goes_on_its_record_stays_and_takes_nothing(tmp_path: Path) -> None:
    live(config(tmp_path), tmp_path / "checkpoint", EVENTS)
    before = record(tmp_path / "test")
    with closing(RunObserver(config(tmp_path), read)) as observer:
        observer.message("engines start")
        with observer.phase("starting engines"):
            pass
        for attempt in (lambda: observer.step(0, {}, []), lambda: observer.evaluation("before", HELD, RESULT)):
            with pytest.raises(AssertionError, match="nothing is recorded before"):
                attempt()
    assert record(tmp_path / "test") == before


def test_what_cannot_be_taken_back_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live(config(tmp_path), tmp_path / "checkpoint", 4)

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with closing(RunObserver(config(tmp_path), read)) as observer:
        monkeypatch.setattr("dapo_megatron.obs.place.os.truncate", fail)
        observer.load_state_dict(json.loads((tmp_path / "checkpoint").read_text()))
        with pytest.raises(ConfigError, match=r"cannot go on with the record in .*: .*Permission denied"):
            observer.begin()


def test_a_place_is_plain_json_and_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr("dapo_megatron.obs.place.os.fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}")))
    with closing(RunObserver(config(tmp_path), read)) as observer:
        observer.step(0, {"loss": 0.5}, [GROUP])
        synced.clear()
        state = observer.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert set(state) == {"steps", "seconds", "files", "sinks"} and state["steps"] == 1
    (events,) = (tmp_path / "test/tensorboard").iterdir()
    assert state["files"] == {
        name: (tmp_path / "test" / name).stat().st_size
        for name in ("metrics.jsonl", "rollouts.jsonl", f"tensorboard/{events.name}")
    }
    assert len(synced) == 3


@pytest.mark.parametrize(
    ("content", "kept", "warning"),
    [
        ("1\n2\n", "1\n2\n", "has 4 bytes, and had 6 when the checkpoint was written"),
        ("1\n2", "1\n2\n", "its last line is cut short"),
        ("1\n22\n3\n", "1\n22\n3\n", "its last line is cut short"),
        ("", "", "has 0 bytes"),
        (None, None, "has 0 bytes"),
        ("1\n2\n3\n4", "1\n2\n3\n", None),
    ],
)
def test_a_file_that_somebody_has_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | None, kept: str | None, warning: str | None
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("1\n2\n3\n")
    before = sizes(tmp_path)
    path.unlink() if content is None else path.write_text(content)
    go_back(tmp_path, before)
    assert (path.read_text() if path.exists() else None) == kept
    assert bool(caplog.records) == bool(warning)
    assert not warning or (warning in caplog.text and str(path) in caplog.text)


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    for name in ("notes.jsonl", "tensorboard/notes.txt", "log.txt"):
        (tmp_path / name).write_text("mine")
    Lines(tmp_path / "metrics.jsonl").append("1\n")
    go_back(tmp_path, Place().files)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["log.txt", "notes.jsonl", "notes.txt"]


def test_a_record_whose_checkpoints_have_gone_is_not_begun_anew(tmp_path: Path) -> None:
    settings = config(tmp_path, checkpoint={"every": EVERY})
    live(settings, tmp_path / "checkpoint", EVENTS)
    before = (tmp_path / "test/metrics.jsonl").read_bytes()
    (tmp_path / "checkpoint").unlink()
    with pytest.raises(ConfigError, match=r"goes past the first checkpoint, and there is none.*run\.existing=rename"):
        live(settings, tmp_path / "checkpoint", 1)
    assert (tmp_path / "test/metrics.jsonl").read_bytes() == before


def test_lines_that_a_disk_did_not_take_come_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = Lines(path)
    lines.append("1\n")
    with monkeypatch.context() as full:
        full.setattr(Path, "open", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        for text in ("2\n", "3\n"):
            with pytest.raises(OSError, match="No space"):
                lines.append(text)
    lines.append("4\n")
    lines.append("5\n")
    assert path.read_text() == "1\n2\n3\n4\n5\n"
