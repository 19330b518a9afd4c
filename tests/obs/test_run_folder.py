from __future__ import annotations

import errno
import json
import os
import platform
from pathlib import Path

import pytest

from dapo_megatron import __version__, config_file
from dapo_megatron.config import Config
from dapo_megatron.errors import ConfigError
from dapo_megatron.obs.run_folder import check_run_folder, open_run_folder


def config(folder: Path, existing: str = "refuse") -> Config:
    run = {"dir": str(folder / "runs"), "name": "test", "existing": existing}
    return config_file.parse({"model": {"path": "x"}, "data": {"train": "x"}, "run": run})


def test_a_new_folder_tells_what_runs_in_it(tmp_path: Path) -> None:
    folder = open_run_folder(config(tmp_path))
    assert folder == tmp_path / "runs/test"
    assert config_file.load(folder / "config.yaml") == config(tmp_path)
    versions = json.loads((folder / "versions.json").read_text())
    assert (versions["dapo_megatron"], versions["python"]) == (__version__, platform.python_version())
    assert {"torch", "megatron-core", "transformers", "platform", "git"} <= set(versions)


def test_results_are_never_mixed(tmp_path: Path) -> None:
    (open_run_folder(config(tmp_path)) / "metrics.jsonl").write_text("old")
    with pytest.raises(ConfigError, match=r"runs/test is there already; .*run\.existing=rename"):
        open_run_folder(config(tmp_path))
    assert (tmp_path / "runs/test/metrics.jsonl").read_text() == "old"


def test_older_runs_are_moved_aside(tmp_path: Path) -> None:
    for number in range(3):
        folder = open_run_folder(config(tmp_path, "rename"))
        (folder / "metrics.jsonl").write_text(str(number))
    found = {path.parent.name: path.read_text() for path in tmp_path.glob("runs/*/metrics.jsonl")}
    assert found == {"test": "2", "test.1": "0", "test.2": "1"}


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match=r"cannot make the folder .*: No space left on device"):
        open_run_folder(config(tmp_path))


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    for attempt in (lambda: check_run_folder(config(tmp_path).run), lambda: open_run_folder(config(tmp_path))):
        with pytest.raises(ConfigError, match=r"cannot make the folder .*runs is not a folder"):
            attempt()
