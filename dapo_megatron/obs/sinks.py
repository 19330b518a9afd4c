"""Where numbers go: JSON lines always, TensorBoard, Weights & Biases and MLflow where the run asks for them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dapo_megatron.config import Config
from dapo_megatron.errors import ConfigError


class Sink(Protocol):
    """Takes the metrics of one step, by name."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_sinks(config: Config, folder: Path) -> list[Sink]:
    """The sinks that `config.run` names.

    Raises:
        ConfigError: for a package that is not installed.
    """
    run = config.run
    sinks: list[Sink] = [JsonlSink(folder / "metrics.jsonl")]
    if run.tensorboard:
        sinks.append(TensorBoardSink(folder / "tensorboard"))
    if run.wandb_project is not None:
        sinks.append(WandbSink(run.wandb_project, run.name, folder, config.model_dump(mode="json")))
    if run.mlflow_uri is not None:
        sinks.append(MlflowSink(run.mlflow_uri, run.name, config.model_dump(mode="json")))
    return sinks


class JsonlSink:
    """One JSON object per line: step, time (seconds since 1970) and the metrics.

    A number that JSON has no word for, such as nan, is null. Every line is flushed when `log` returns.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(_missing("tensorboard", "run.tensorboard=false", "pip install tensorboard")) from error
        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    def __init__(self, project: str, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                _missing("wandb", "run.wandb_project=null", "pip install 'dapo_megatron[wandb]'")
            ) from error
        self._run: Any = wandb.init(project=project, name=name, dir=str(folder), config=dict(config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    def __init__(self, uri: str, name: str, config: Mapping[str, Any]) -> None:
        try:
            import mlflow  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                _missing("mlflow", "run.mlflow_uri=null", "pip install 'dapo_megatron[mlflow]'")
            ) from error
        self._mlflow: Any = mlflow
        mlflow.set_tracking_uri(uri)
        mlflow.start_run(run_name=name)
        mlflow.log_dict(dict(config), "config.json")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({name: value for name, value in metrics.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _missing(package: str, switch: str, install: str) -> str:
    return f"run: {package} is not installed; {install}, or set {switch}"
