from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dapo_megatron import config_file
from dapo_megatron.config import Config
from dapo_megatron.errors import ConfigError
from dapo_megatron.obs.place import Place, go_back, sizes
from dapo_megatron.obs.sinks import JsonlSink, Resilient, TensorBoardSink, WandbSink, check_sinks, open_sinks


def parse(run: dict[str, Any]) -> Config:
    return config_file.parse({"model": {"path": "x"}, "data": {"train": "x"}, "run": {"tensorboard": False, **run}})


def refuse_constants(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def test_json_lines_are_json_also_where_a_number_is_not_finite(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log(1, {"loss": math.nan, "ratio/max": math.inf, "accuracy": 0.5, "groups/kept": 32})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # on disk before the sink is closed
    sink.log(2, {"loss": 0.25})
    sink.close()
    first, second = (
        json.loads(line, parse_constant=refuse_constants)
        for line in [*lines, (tmp_path / "metrics.jsonl").read_text().splitlines()[1]]
    )
    assert first.pop("time") <= second.pop("time")
    assert first == {"step": 1, "loss": None, "ratio/max": None, "accuracy": 0.5, "groups/kept": 32}
    assert second == {"step": 2, "loss": 0.25}


def test_tensorboard_reads_it_back(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.log(3, {"seconds/rollout": 1.5})
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("seconds/rollout")] == [(3, 1.5)]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, round(event.value, 3)) for event in events.Scalars(name)]


def test_tensorboard_sees_no_step_twice_where_a_run_goes_on(tmp_path: Path) -> None:
    """Also one that keeps what it has read: it is told to forget."""
    sink = TensorBoardSink(tmp_path / "tensorboard")
    watching = EventAccumulator(str(tmp_path / "tensorboard"))
    sink.log(0, {"eval/accuracy": 0.1})
    for step in (1, 2):
        sink.log(step, {"loss": step / 10})
    place = Place(2, 1.0, sizes(tmp_path))
    sink.log(2, {"eval/accuracy": 0.2})
    sink.log(3, {"loss": 99.0})
    sink.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    with file.open("ab") as cut_short:
        cut_short.write(b"\x18\0\0\0")  # the beginning of a record
    watching.Reload()
    assert len(watching.Scalars("loss")) == 3

    go_back(tmp_path, place.files)
    sink = TensorBoardSink(tmp_path / "tensorboard", place.steps)
    sink.log(2, {"eval/accuracy": 0.3})
    for step in (3, 4):
        sink.log(step, {"loss": step / 10})
    sink.close()
    assert scalars(tmp_path / "tensorboard", "loss") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert scalars(tmp_path / "tensorboard", "eval/accuracy") == [(0, 0.1), (2, 0.3)]
    watching.Reload()
    assert [event.step for event in watching.Scalars("loss")] == [1, 2, 3, 4]


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    config = parse({"mlflow_uri": str(tmp_path / "mlflow"), "name": "sums"})
    _, sink = open_sinks(config, tmp_path).values()
    sink.log(1, {"loss": 0.1, "accuracy": math.nan})
    place = Place(1, 1.0, sizes(tmp_path), {"run.mlflow_uri": sink.place})
    sink.log(2, {"loss": 0.2, "accuracy": 0.5})
    sink.log(2, {"eval/accuracy": 0.7})
    sink.close()

    longer = config_file.parse({**config.model_dump(mode="json"), "train": {"steps": 1000}})
    _, sink = open_sinks(longer, tmp_path, place).values()
    for step in (2, 3):
        sink.log(step, {"loss": step / 10, "accuracy": step / 10})
        sink.log(step, {"eval/accuracy": 0.7})
    sink.close()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FINISHED" and run.data.params["train.steps"] == "330"
    for name, expected in {
        "loss": [(1, 0.1), (2, 0.2), (3, 0.3)],
        "accuracy": [(2, 0.5), (3, 0.3)],
        "eval/accuracy": [(2, 0.7), (3, 0.7)],
    }.items():
        history = client.get_metric_history(run.info.run_id, name)
        assert sorted((point.step, point.value) for point in history) == expected

    elsewhere = parse({"mlflow_uri": str(tmp_path / "elsewhere")})
    _, sink = open_sinks(elsewhere, tmp_path, place).values()
    sink.close()
    assert len(MlflowClient(f"sqlite:///{tmp_path}/elsewhere/mlflow.db").search_runs(["0"])) == 1


@pytest.mark.parametrize("form", ["{}", "file:{}", "file://{}", "sqlite:///{}/mlflow.db"])
def test_mlflow_reads_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """The real MLflow: a folder that is not there yet, and the database that it becomes."""
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    uri = form.format(tmp_path / "results/mlflow")
    if uri.startswith("sqlite"):
        (tmp_path / "results/mlflow").mkdir(parents=True)
    config = parse({"mlflow_uri": uri, "name": "sums"})
    check_sinks(config.run)
    _, sink = open_sinks(config, tmp_path).values()
    sink.log(1, {"seconds/rollout": 1.5, "loss": math.nan})
    sink.log(2, {"seconds/rollout": 2.5, "loss": 0.25})
    sink.close()

    client = MlflowClient(f"sqlite:///{tmp_path}/results/mlflow/mlflow.db")
    (run,) = client.search_runs(["0"])
    assert (run.info.run_name, run.info.status) == ("sums", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "seconds/rollout")
    assert [(point.step, point.value) for point in history] == [(1, 1.5), (2, 2.5)]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [2]
    assert run.data.params["train.seed"] == "0" and run.data.params["run.name"] == "sums"
    assert {path.name for path in tmp_path.iterdir()} == {"results", "metrics.jsonl"}


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("http://127.0.0.1:9", "Connection refused"),
        ("nonsense://place", "Supported URI schemes"),
        ("{}/file/folder", "Not a directory"),
        ("sqlite:////proc/no/mlflow.db", "cannot be reached there"),
    ],
)
def test_mlflow_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, reason: str) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "file").touch()
    uri = uri.format(tmp_path)
    with pytest.raises(ConfigError) as refused:
        check_sinks(parse({"mlflow_uri": uri}).run)
    assert f"run.mlflow_uri={uri}: MLflow cannot be reached there" in str(refused.value)
    assert reason in str(refused.value) and "give a folder" in str(refused.value)


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of wandb as on a machine where nobody has logged in, with a server that is not there."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "HOME": str(tmp_path / "home"),
        "NETRC": str(tmp_path / "home/netrc"),
        "WANDB_CONFIG_DIR": str(tmp_path / "home"),
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_SILENT": "true",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


def in_a_process_of_its_own(code: str, *arguments: str | Path) -> str:
    """wandb keeps its settings for the life of a process. Returns what `code` prints."""
    program = f"import sys\nfrom tests.obs.test_sinks import *\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("nobody")
def test_wandb_offline_reads_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real wandb, offline: what was logged is in the file that `wandb sync` sends."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    in_a_process_of_its_own(
        "config = parse({'wandb_project': 'math', 'name': 'sums'})\n"
        "check_sinks(config.run)\n"
        "_, sink = open_sinks(config, Path(sys.argv[1])).values()\n"
        "sink.log(1, {'seconds/rollout': 1.5})\n"
        "sink.log(2, {'seconds/rollout': 2.5})\n"
        "sink.close()",
        tmp_path,
    )
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    history, run = read_wandb(file)
    assert [(row["_step"], row["seconds/rollout"]) for row in history] == [(1, 1.5), (2, 2.5)]
    assert (run.project, run.display_name) == ("math", "sums")
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings["run"]["name"] == "sums"


@pytest.mark.usefixtures("nobody")
def test_wandb_offline_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each life of a run has a file of its own, and all have one run's id. In another project a new run begins."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    life = (
        "config = parse({'wandb_project': sys.argv[2], 'name': 'sums'})\n"
        "at = Place(1, 1.0, {}, {'run.wandb_project': json.loads(sys.argv[3])}) if sys.argv[3] else None\n"
        "_, sink = open_sinks(config, Path(sys.argv[1]), at).values()\n"
        "sink.log(2 if at else 1, {'loss': 1.5})\n"
        "sink.close()\n"
        "print('PLACE', json.dumps(sink.place))"
    )
    places = [""]
    for number, project in enumerate(("math", "math", "other")):
        (folder := tmp_path / str(number)).mkdir()
        said = in_a_process_of_its_own(life, folder, project, places[-1])
        places.append(said.split("PLACE ")[1])
    runs = [read_wandb(next(tmp_path.glob(f"{number}/wandb/offline-run-*/run-*.wandb"))) for number in range(3)]
    assert [[row["_step"] for row in history] for history, _ in runs] == [[1], [2], [2]]
    first, second, third = (run.run_id for _, run in runs)
    assert first == second != third
    assert json.loads(places[2]) == {"project": "math", "id": first}


def read_wandb(file: Path) -> tuple[list[dict[str, Any]], Any]:
    """The rows of the history and the run, from the file of an offline run: a LevelDB log of protobuf records."""
    from wandb.proto import wandb_internal_pb2

    data = file.read_bytes()
    assert data.startswith(b":W&B") and len(data) <= 32_768, "one block, so that no record is split"
    history, run, place = [], None, 7
    while place < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, place)
        assert kind == 1, "a whole record"
        whole = data[place + 7 : place + 7 + length]
        record = wandb_internal_pb2.Record.FromString(whole)  # pyright: ignore[reportAttributeAccessIssue]
        place += 7 + length
        if record.HasField("run"):
            run = record.run
        if record.HasField("history"):
            items = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return history, run


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (None, "nobody is logged in"),
        ("short", "Weights & Biases cannot be used"),
        ("a" * 40, "http://127.0.0.1:9 does not answer"),
    ],
)
def test_wandb_that_takes_no_run(monkeypatch: pytest.MonkeyPatch, key: str | None, reason: str) -> None:
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    said = in_a_process_of_its_own(
        "try:\n    check_sinks(parse({'wandb_project': 'math'}).run)\nexcept ConfigError as error:\n    print(error)"
    )
    assert reason in said
    assert "run `wandb login`, set WANDB_MODE=offline, or set run.wandb_project=null" in said


class Flaky:
    """A sink that fails while `broken` says why."""

    def __init__(self) -> None:
        self.broken: Exception | None = None
        self.steps: list[int] = []
        self.place = {"at": "home"}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.broken:
            raise self.broken
        self.steps.append(step)

    def close(self) -> None:
        if self.broken:
            raise self.broken


def test_a_sink_that_fails_in_between_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    inner = Flaky()
    sink = Resilient("run.mlflow_uri", inner)
    sink.log(1, {})
    inner.broken = OSError(28, "No space left on device")
    for step in (2, 3, 4):
        sink.log(step, {})
    assert [record.getMessage() for record in caplog.records] == [
        "run.mlflow_uri: could not log step 2 (OSError: [Errno 28] No space left on device); the run goes on, and "
        "later steps are tried again"
    ]
    inner.broken = None
    sink.log(5, {})
    inner.broken = ValueError("gone")
    sink.log(6, {})
    sink.close()
    assert inner.steps == [1, 5] and sink.place == {"at": "home"}
    assert [record.getMessage().split(" (")[0] for record in caplog.records[1:]] == [
        "run.mlflow_uri: could not log step 6",
        "run.mlflow_uri: could not be closed",
    ]


def test_wandb_that_does_not_finish_is_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    sink = object.__new__(WandbSink)
    sink._run = SimpleNamespace(finish=threading.Event().wait)
    monkeypatch.setattr("dapo_megatron.obs.sinks._FINISH_SECONDS", 0.1)
    Resilient("run.wandb_project", sink).close()
    assert "run.wandb_project: could not be closed (TimeoutError: not all was sent within 0.1 s" in caplog.text


def test_mlflow_whose_database_is_gone_does_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import sqlite3

    config = parse({"mlflow_uri": str(tmp_path / "mlflow")})
    lines, sink = open_sinks(config, tmp_path).values()
    with sqlite3.connect(tmp_path / "mlflow/mlflow.db") as database:
        database.execute("DROP TABLE metrics")
    for step in (1, 2):
        for each in (lines, sink):
            each.log(step, {"loss": 0.5})
    sink.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "dapo_megatron.obs.sinks"]
    assert warning.startswith("run.mlflow_uri: could not log step 1 (MlflowException: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that has no space")
def test_a_full_disk_does_not_end_a_run(caplog: pytest.LogCaptureFixture) -> None:
    sink = Resilient("metrics.jsonl", JsonlSink(Path("/dev/full")))
    for step in (1, 2):
        sink.log(step, {"loss": 0.5})
    assert "metrics.jsonl: could not log step 1 (OSError: [Errno 28]" in caplog.text
    assert "step 2" not in caplog.text


def test_a_sink_that_cannot_be_opened_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"cannot open the metrics of this run: IsADirectoryError: .*metrics.jsonl"):
        open_sinks(parse({}), tmp_path)
