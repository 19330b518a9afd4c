from __future__ import annotations

import errno
import json
import os
import platform
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dapo_megatron import __version__, config_file
from dapo_megatron.config import Config
from dapo_megatron.errors import ConfigError
from dapo_megatron.obs.run_folder import AGAIN, RunFolder, check_run_folder, nothing_to_do, open_run_folder


def config(folder: Path, existing: str = "refuse", **sections: dict[str, Any]) -> Config:
    run = {"dir": str(folder / "runs"), "name": "test", "existing": existing}
    model = folder / "model"
    if not model.exists():
        model.mkdir(parents=True)
        (model / "config.json").write_text('{"hidden_size": 8, "transformers_version": "4"}')
    return config_file.parse(
        {
            "model": {"path": str(model), **sections.pop("model", {})},
            "data": {"train": "x.jsonl", **sections.pop("data", {})},
            "run": run,
            **sections,
        }
    )


def opened(config: Config) -> Path:
    """Open its folder, and end."""
    with closing(open_run_folder(config)) as run:
        return run.path


def went_on(config: Config, steps: int) -> list[str]:
    """Go on in its folder after `steps` steps; returns what is told."""
    check_run_folder(config)
    with closing(open_run_folder(config)) as run:
        assert run.resumed
        run.go_on(steps)
        return run.notes


def refused(config: Config) -> str:
    """Why its folder cannot be opened, which is known before anything is started."""
    reasons = []
    for attempt in (check_run_folder, open_run_folder):
        with pytest.raises(ConfigError) as error:
            attempt(config)
        reasons.append(str(error.value))
    assert reasons[0] == reasons[1]
    return reasons[0]


def test_a_new_folder_tells_what_runs_in_it(tmp_path: Path) -> None:
    with closing(open_run_folder(config(tmp_path))) as run:
        assert (run.path, run.resumed, run.notes) == (tmp_path / "runs/test", False, [])
        assert config_file.load(run.path / "config.yaml") == config(tmp_path)
        versions = json.loads((run.path / "versions.json").read_text())
    assert (versions["dapo_megatron"], versions["python"]) == (__version__, platform.python_version())
    assert {"torch", "megatron-core", "transformers", "platform", "git", "model_config"} <= set(versions)
    assert "resumed" not in versions


def test_results_are_never_mixed(tmp_path: Path) -> None:
    (opened(config(tmp_path)) / "metrics.jsonl").write_text("old")
    assert re.search(r"runs/test is there already; .*run\.existing=rename .*--resume", refused(config(tmp_path)))
    assert (tmp_path / "runs/test/metrics.jsonl").read_text() == "old"


def test_older_runs_are_moved_aside(tmp_path: Path) -> None:
    for number in range(3):
        (opened(config(tmp_path, "rename")) / "metrics.jsonl").write_text(str(number))
    found = {path.parent.name: path.read_text() for path in tmp_path.glob("runs/*/metrics.jsonl")}
    assert found == {"test": "2", "test.1": "0", "test.2": "1"}


def test_the_same_command_begins_a_run_and_goes_on_with_it(tmp_path: Path) -> None:
    """A folder that holds no run yet, such as one with the log of the batch system, is begun in as well."""
    here = config(tmp_path, "resume")
    here.run.folder.mkdir(parents=True)
    (here.run.folder / "slurm.out").write_text("starting")
    check_run_folder(here)
    with closing(open_run_folder(here)) as run:
        assert not run.resumed
    assert went_on(here, 3) == []
    assert (here.run.folder / "slurm.out").read_text() == "starting"


def test_what_changed_is_told_and_kept(tmp_path: Path) -> None:
    folder = opened(config(tmp_path, parallel={"tp": 2}))
    versions = folder / "versions.json"
    began_with = {**json.loads(versions.read_text()), "torch": "1.0"}
    versions.write_text(json.dumps(began_with))
    torch = __import__("importlib.metadata", fromlist=["version"]).version("torch")

    longer = config(tmp_path, "resume", train={"steps": 400}, optimizer={"lr": 1e-5})
    assert went_on(longer, 7) == [
        "changed: parallel.tp: 2 -> 1 (results are the same to rounding)",
        "changed: optimizer.lr: 1e-06 -> 1e-05 (the run is another one from here on)",
        "changed: train.steps: 330 -> 400",
        f"begun with torch 1.0, goes on with {torch}",
    ]
    assert config_file.load(folder / "config.yaml") == longer
    assert went_on(longer, 9) == [f"begun with torch 1.0, goes on with {torch}"]
    told = json.loads(versions.read_text())
    lives = told.pop("resumed")
    assert told == began_with
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", life.pop("time")) for life in lives)
    assert lives == [
        {
            "step": 7,
            "changed": {"parallel.tp": [2, 1], "optimizer.lr": [1e-6, 1e-5], "train.steps": [330, 400]},
            "versions": {"torch": ["1.0", torch]},
        },
        {"step": 9, "changed": {}, "versions": {"torch": ["1.0", torch]}},
    ]


def test_nothing_changes_before_it_is_known_where_a_run_goes_on(tmp_path: Path) -> None:
    folder = opened(config(tmp_path))

    def content() -> dict[str, str]:
        return {path.name: path.read_text() for path in folder.iterdir() if path.name != "lock"}

    before = content()
    opened(config(tmp_path, "resume", train={"steps": 400}))
    assert content() == before


@pytest.mark.parametrize(
    ("sections", "messages"),
    [
        ({"train": {"seed": 1}}, ["train.seed: 0 -> 1 (the order of prompts and every sample come from it)"]),
        ({"engine": {"seed": 5}}, ["engine.seed: null -> 5"]),
        ({"data": {"template": "Q: {problem}"}}, ['data.template: "{problem}" -> "Q: {problem}"']),
        ({"model": {"dtype": "float32"}, "train": {"seed": 2}}, ["model.dtype", "train.seed: 0 -> 2"]),
    ],
)
def test_a_change_with_which_a_run_cannot_go_on(tmp_path: Path, sections: Any, messages: list[str]) -> None:
    folder = opened(config(tmp_path))
    before = (folder / "config.yaml").read_text()
    said = refused(config(tmp_path, "resume", train={"steps": 7, **sections.pop("train", {})}, **sections))
    assert "set it back, or choose another run.name" in said and "train.steps" not in said
    assert all(message in said for message in messages), said
    assert (folder / "config.yaml").read_text() == before


def test_a_model_may_move_but_not_change(tmp_path: Path) -> None:
    opened(config(tmp_path))
    (tmp_path / "model").rename(tmp_path / "moved")
    moved = {"path": str(tmp_path / "moved")}
    (tmp_path / "moved/config.json").write_text('{"transformers_version": "5", "hidden_size": 8}')
    (note,) = went_on(config(tmp_path, "resume", model=moved), 1)
    assert re.fullmatch(r'changed: model\.path: ".*/model" -> ".*/moved" \(its config\.json holds the same\)', note)
    (tmp_path / "moved/config.json").write_text('{"hidden_size": 16}')
    assert "began with another model" in refused(config(tmp_path, "resume", model=moved))


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    here = config(tmp_path, "resume")
    (here.run.folder / "checkpoints").mkdir(parents=True)
    assert "holds checkpoints, but no config.yaml" in refused(here)


def test_a_config_of_another_version(tmp_path: Path) -> None:
    folder = opened(config(tmp_path))
    with (folder / "config.yaml").open("a") as file:
        file.write("colour: red\n")
    said = refused(config(tmp_path, "resume"))
    assert "config.yaml, the configuration of the run that is to go on" in said and "unknown key colour" in said


def test_a_run_that_is_over(tmp_path: Path) -> None:
    here = config(tmp_path, "resume", train={"steps": 10})
    assert nothing_to_do(here) == []
    with closing(open_run_folder(here)) as run:
        run.summarise({"steps": 10})
    assert nothing_to_do(config(tmp_path, "rename", train={"steps": 10})) == []
    (said,) = nothing_to_do(here)
    assert "it has done 10 steps, and train.steps is 10; set train.steps to more than 10" in said
    longer = config(tmp_path, "resume", train={"steps": 11})
    assert nothing_to_do(longer) == []
    went_on(longer, 10)
    assert nothing_to_do(here) == [] and not (here.run.folder / "summary.json").exists()
    (here.run.folder / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*summary\.json"):
        nothing_to_do(here)


def test_the_policy_of_a_run_that_was_over_is_not_that_of_the_one_that_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(tmp_path, "resume", train={"steps": 4})
    policy = opened(settings) / "hf"
    policy.mkdir()
    went_on(settings, 4)
    assert policy.is_dir() and not caplog.records
    went_on(config(tmp_path, "resume", train={"steps": 6}), 4)
    assert not policy.exists() and policy.with_name("hf.1").is_dir()
    assert "hf/, is now" in caplog.text


def test_a_run_that_is_over_looks_at_what_changed(tmp_path: Path) -> None:
    with closing(open_run_folder(config(tmp_path, train={"steps": 10}))) as run:
        run.summarise({"steps": 10})
    changed, over = nothing_to_do(config(tmp_path, "resume", train={"steps": 9}))
    assert changed == "changed: train.steps: 10 -> 9"
    assert "is over: it has done 10 steps" in over
    with pytest.raises(ConfigError, match=r"cannot go on with another\n  train\.seed: 0 -> 1"):
        nothing_to_do(config(tmp_path, "resume", train={"steps": 10, "seed": 1}))


def test_whoever_starts_a_run_again_has_met_its_request(tmp_path: Path) -> None:
    with closing(open_run_folder(config(tmp_path))) as run:
        run.ask_again()
    check_run_folder(config(tmp_path, "resume"))
    assert (run.path / AGAIN).exists()
    with closing(open_run_folder(config(tmp_path, "resume"))):
        assert not (run.path / AGAIN).exists()


@pytest.mark.parametrize("attempt", [lambda run: run.go_on(3), lambda run: run.summarise({"steps": 3})])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt: Callable[[RunFolder], object]
) -> None:
    with closing(open_run_folder(config(tmp_path))) as run:
        run.summarise({"steps": 2})
    before = {path.name: path.read_text() for path in run.path.glob("*.*")}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with closing(open_run_folder(config(tmp_path, "resume"))) as run:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            attempt(run)
    assert {name: (run.path / name).read_text() for name in before} == before
    for existing in ("rename", "resume"):
        with pytest.raises(ConfigError, match=r"cannot use the folder .*: No space left on device"):
            open_run_folder(config(tmp_path / existing, existing))


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    for existing in ("refuse", "rename", "resume"):
        assert re.search("cannot make the folder .*runs is not a folder", refused(config(tmp_path, existing)))
