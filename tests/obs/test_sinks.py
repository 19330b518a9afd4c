from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dapo_megatron import config_file
from dapo_megatron.errors import ConfigError
from dapo_megatron.obs.sinks import JsonlSink, TensorBoardSink, open_sinks


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


@pytest.mark.parametrize(
    ("package", "setting", "extra"),
    [
        ("wandb", {"wandb_project": "math"}, r"\[wandb\].*run.wandb_project=null"),
        ("mlflow", {"mlflow_uri": "file:/nowhere"}, r"\[mlflow\].*run.mlflow_uri=null"),
    ],
)
def test_a_missing_package_is_named(
    tmp_path: Path, package: str, setting: dict[str, str], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    config = config_file.parse(
        {"model": {"path": "x"}, "data": {"train": "x"}, "run": {"tensorboard": False, **setting}}
    )
    with pytest.raises(ConfigError, match=f"{package} is not installed.*{extra}"):
        open_sinks(config, tmp_path)
