"""Where numbers go: JSON lines always, TensorBoard, Weights & Biases and MLflow where the run asks for them."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.request import urlopen

from dapo_megatron.config import Config, RunConfig
from dapo_megatron.errors import ConfigError
from dapo_megatron.obs.changes import flat
from dapo_megatron.obs.place import METRICS, TENSORBOARD, Lines, Place

log = logging.getLogger(__name__)

_ANSWER_SECONDS = 10
"""A server that has not answered by then counts as gone."""
_FINISH_SECONDS = 60.0


class Sink(Protocol):
    """Takes the metrics of one step, by name."""

    @property
    def place(self) -> dict[str, str]:
        """What it takes to go on here after a restart; empty where it is all in the run's folder."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_sinks(run: RunConfig) -> None:
    """Refuse what cannot be logged to. Asks the servers that the run names; the packages must be installed.

    Raises:
        ConfigError: for an MLflow address that is none or does not answer, and for Weights & Biases without a login or
            where its server does not answer.
    """
    if run.wandb_project is not None:
        _check_wandb()
    if run.mlflow_uri is not None:
        _check_mlflow(run.mlflow_uri)


def open_sinks(config: Config, folder: Path, at: Place | None = None) -> dict[str, Sink]:
    """Open the sinks that `config.run` names. What one of them cannot write later is no error: see `Resilient`.

    Args:
        at: where the record goes on, whose files have been taken back there; None for a record that begins.

    Returns:
        Name -> sink.

    Raises:
        ConfigError: for a sink that cannot be opened, although `check_sinks` has passed.
    """
    run, values = config.run, config.model_dump(mode="json")
    before: Mapping[str, dict[str, str]] = at.sinks if at else {}
    openers: dict[str, Callable[[], Sink]] = {METRICS: lambda: JsonlSink(folder / METRICS)}
    if run.tensorboard:
        after = at.steps if at else None
        openers["run.tensorboard"] = lambda: TensorBoardSink(folder / TENSORBOARD, after)
    if (project := run.wandb_project) is not None:
        known = before.get("run.wandb_project", {})
        openers["run.wandb_project"] = lambda: WandbSink(project, run.name, folder, values, known)
    if (uri := run.mlflow_uri) is not None:
        place = before.get("run.mlflow_uri", {})
        openers["run.mlflow_uri"] = lambda: MlflowSink(uri, run.name, values, place)
    sinks: dict[str, Sink] = {}
    try:
        for name, open_sink in openers.items():
            sinks[name] = Resilient(name, open_sink())
    except Exception as error:  # each library has errors of its own, and so have the ones beneath it
        for sink in sinks.values():
            sink.close()
        raise ConfigError(f"cannot open the metrics of this run: {type(error).__name__}: {error}") from error
    return sinks


class Tried:
    """What may fail without ending a run: it is told once, as a warning, and again after it has worked in between.

    A server may be gone for an hour, a disk full until somebody looks. A run of weeks goes on meanwhile, and every step
    is tried again.

    Args:
        name: what is written to.
        errors: what may be raised inside.
    """

    def __init__(self, name: str, errors: type[Exception]) -> None:
        self._name, self._errors = name, errors
        self._failing = False

    @contextmanager
    def __call__(self, doing: str) -> Iterator[None]:
        try:
            yield
            self._failing = False
        except self._errors as error:
            told, self._failing = self._failing, True  # before it is told, which may fail in the same way
            if not told:
                log.warning(
                    f"{self._name}: could not {doing} ({type(error).__name__}: {error}); "
                    f"the run goes on, and later steps are tried again"
                )


class Resilient:
    """A sink that never ends a run."""

    def __init__(self, name: str, sink: Sink) -> None:
        self._name, self._sink = name, sink
        # Whatever the library or the system raises, training does not depend on it.
        self._logging = Tried(name, Exception)

    @property
    def place(self) -> dict[str, str]:
        return self._sink.place

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._logging(f"log step {step}"):
            self._sink.log(step, metrics)

    def close(self) -> None:
        try:
            self._sink.close()
        except Exception as error:
            log.warning(f"{self._name}: could not be closed ({type(error).__name__}: {error})")


class JsonlSink:
    """One JSON object per line: step, time (seconds since 1970) and the metrics.

    A number that JSON has no word for, such as nan, is null. Every line is written when `log` returns.
    """

    def __init__(self, path: Path) -> None:
        self.place: dict[str, str] = {}
        self._lines = Lines(path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        row = {"step": step, "time": round(time.time(), 3), **values}
        self._lines.append(json.dumps(row, allow_nan=False) + "\n")

    def close(self) -> None: ...


class TensorBoardSink:
    """Events in a file of their own for each life of a run.

    Args:
        after: where a run goes on, the steps that are done. A TensorBoard that is open meanwhile forgets what it has
            read of later ones.
    """

    def __init__(self, folder: Path, after: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.place: dict[str, str] = {}
        self._writer = SummaryWriter(str(folder), purge_step=None if after is None else after + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A run of Weights & Biases. WANDB_MODE=offline keeps it in the run's folder, for `wandb sync`.

    wandb sends from a process of its own, which waits for a server that is gone. By its documentation, a run goes on
    from the last step that the server has: what is made again after a restart stays as it was.

    Args:
        place: that of the sink whose run goes on. In another project a new one begins.
    """

    def __init__(
        self, project: str, name: str, folder: Path, config: Mapping[str, Any], place: Mapping[str, str]
    ) -> None:
        import wandb

        known = place.get("id") if place.get("project") == project else None
        self._run: Any = wandb.init(
            project=project,
            name=name,
            dir=str(folder),
            config=dict(config),
            id=known,
            resume="allow" if known else None,
        )
        self.place = {"project": project, "id": str(self._run.id)}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        finishing = Thread(target=self._run.finish, daemon=True)
        finishing.start()
        finishing.join(_FINISH_SECONDS)
        if finishing.is_alive():
            raise TimeoutError(
                f"not all was sent within {_FINISH_SECONDS:g} s; what is left is in the run's folder, for `wandb sync`"
            )


class MlflowSink:
    """A run of MLflow: metrics, and the config as parameters `section.key`. Writes no artifacts.

    Of steps that MLflow has, it is sent nothing again: it would keep both.

    Args:
        place: that of the sink whose run goes on, with the parameters it has. At another address a new one begins.
    """

    def __init__(self, uri: str, name: str, config: Mapping[str, Any], place: Mapping[str, str]) -> None:
        self._mlflow, address = _mlflow(), tracking_uri(uri)
        self._mlflow.set_tracking_uri(address)
        self._last_steps: dict[str, int] = {}
        if place.get("uri") == address:
            run_id = self._mlflow.start_run(run_id=place["run_id"]).info.run_id
            self._last_steps = _last_steps(self._mlflow.MlflowClient(address), run_id)
        else:
            run_id = self._mlflow.start_run(run_name=name).info.run_id
            self._mlflow.log_params(flat(config))
        self.place = {"uri": address, "run_id": run_id}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        new = {
            name: value
            for name, value in metrics.items()
            if math.isfinite(value) and step > self._last_steps.get(name, -1)
        }
        self._mlflow.log_metrics(new, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _last_steps(client: Any, run_id: str) -> dict[str, int]:
    """Return metric -> the last step that a run of MLflow has of it."""
    names = client.get_run(run_id).data.metrics
    return {name: max(point.step for point in client.get_metric_history(run_id, name)) for name in names}


def tracking_uri(uri: str) -> str:
    """Return what MLflow is given: for a folder, the database mlflow.db in it, because MLflow 3 refuses plain folders.

    >>> tracking_uri("/results/mlflow"), tracking_uri("http://tracker:5000")
    ('sqlite:////results/mlflow/mlflow.db', 'http://tracker:5000')
    """
    if uri.startswith("file:"):
        uri = uri.removeprefix("file:").removeprefix("//")
    elif "://" in uri or uri == "databricks":
        return uri
    return f"sqlite:///{Path(uri).absolute() / 'mlflow.db'}"


def _mlflow() -> Any:
    import mlflow

    # By its own defaults MLflow tries for minutes, and a step of the run would wait for it.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(_ANSWER_SECONDS))
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return mlflow


def _check_mlflow(uri: str) -> None:
    try:
        _mlflow().MlflowClient(tracking_uri(uri)).search_experiments(max_results=1)
    except Exception as error:  # MLflow's, the database's, the network's, and those of packages for one kind of URI
        raise ConfigError(
            f"run.mlflow_uri={uri}: MLflow cannot be reached there ({type(error).__name__}: {error}); give a folder, a "
            f"database such as sqlite:////folder/mlflow.db, or a server such as http://host:5000, or set it to null"
        ) from error


def _check_wandb() -> None:
    """Look for a login and for the server. Whether it takes the login, `wandb.init` finds out: wandb's own check hangs
    for minutes at times where no server answers.
    """
    remedy = "run `wandb login`, set WANDB_MODE=offline, or set run.wandb_project=null"
    try:
        import wandb

        settings = wandb.setup().settings
        if settings.mode in ("offline", "dryrun", "disabled"):
            return
        logged_in = wandb.login(prompt=False, verify=False)
        if logged_in:
            _check_answers(settings.base_url)
    except Exception as error:  # no server, a login that can be none, settings that cannot be read
        raise ConfigError(f"run.wandb_project: Weights & Biases cannot be used ({error}); {remedy}") from error
    if not logged_in:
        raise ConfigError(f"run.wandb_project is set, but nobody is logged in to Weights & Biases: {remedy}")


def _check_answers(address: str) -> None:
    """Raise OSError where no web server answers. An answer that is an error shows that it is there."""
    try:
        urlopen(address, timeout=_ANSWER_SECONDS).close()
    except HTTPError:
        return
    except OSError as error:
        raise OSError(f"{address} does not answer: {error}") from error
