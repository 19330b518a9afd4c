from __future__ import annotations

import json
import logging
import os
import resource
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from dapo_megatron import config_file
from dapo_megatron.config import HELD_OUT, Config, DataConfig, HeldOut
from dapo_megatron.eval.evaluate import EvalResult, Example
from dapo_megatron.obs import observer as observer_module
from dapo_megatron.obs.metrics import METRICS
from dapo_megatron.obs.observer import NullObserver, RunObserver
from dapo_megatron.types import FinishReason, Group, Prompt, VersionSpan
from tests.helpers.completions import read, written

EVIL = "3\x1b[2J\n[bold]Answer: 3"

GROUP = Group(
    Prompt("train.jsonl:1", (1, 2), "1+2=", "3"),
    (
        replace(written(EVIL), versions=(VersionSpan(4, 0, len(EVIL)),)),
        replace(written("999\ud83d", FinishReason.LENGTH), versions=(VersionSpan(4, 0, 4),)),
    ),
    ("3", None),
    (True, False),
    (1.0, -1.5),
)

RESULT = EvalResult(
    prompts=1,
    samples=1,
    accuracy=0.25,
    standard_error=0.1,
    interval=(0.125, 0.375),
    pass_at_k={1: 0.25},
    majority_at_k=0.25,
    mean_length=12.5,
    truncated=0.0,
    examples=(Example("1+2=", "3", EVIL, "3", True),),
)

HELD = HeldOut(HELD_OUT, "heldout.jsonl", DataConfig(train="x"), 0, 1, 1.0, 1.0, "dapo")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    run = {"dir": str(tmp_path), "name": "test", "tensorboard": False, "sampled_groups": 1}
    return config_file.parse({"model": {"path": "x"}, "data": {"train": "x"}, "train": {"steps": 2}, "run": run})


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run(config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "test"
    observer = RunObserver(config, read)
    started = time.monotonic()
    with observer.phase("starting engines"):
        time.sleep(0.2)
    observer.evaluation("before", HELD, RESULT)
    for step in range(2):
        with observer.phase("rollout"):
            time.sleep(0.02)
        time.sleep(0.01)
        with observer.phase("update"):
            pass
        observer.step(step, {"accuracy": 0.5 + step}, [GROUP, GROUP])
    ended = time.monotonic()
    after = replace(RESULT, accuracy=0.75)
    observer.evaluation("after", HELD, after)
    observer.summary({"final_accuracy": 0.75, "seed": 0}, {HELD_OUT: {"before": RESULT, "after": after}})
    observer.close()

    before, first, second, after = rows(folder / "metrics.jsonl")
    assert [row["step"] for row in (before, first, second, after)] == [0, 1, 2, 2]
    assert (before["eval/accuracy"], after["eval/accuracy"]) == (0.25, 0.75)
    assert (before["eval/accuracy_low"], before["eval/response_length"]) == (0.125, 12.5)
    assert (first["accuracy"], second["accuracy"]) == (0.5, 1.5)
    for row in (first, second):
        assert row["seconds/rollout"] >= 0.02
        assert row["seconds/step"] >= row["seconds/rollout"] + 0.01 + row["seconds/update"]
    # Neither the start of the engines nor the first step counts towards the second.
    assert first["seconds/step"] + second["seconds/step"] < ended - started - 0.2
    assert "seconds/step" not in before

    sampled = rows(folder / "rollouts.jsonl")
    assert [row["step"] for row in sampled] == [1, 2]
    assert sampled[0]["answer"] == "3"
    assert sampled[0]["responses"] == [
        {
            "text": EVIL,
            "extracted": "3",
            "correct": True,
            "reward": 1.0,
            "length": len(EVIL),
            "finish": "stop",
            "versions": [{"version": 4, "start": 0, "end": len(EVIL)}],
        },
        {
            "text": "999\ud83d",
            "extracted": None,
            "correct": False,
            "reward": -1.5,
            "length": 4,
            "finish": "length",
            "versions": [{"version": 4, "start": 0, "end": 4}],
        },
    ]
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("seconds", "seconds_last_life"):
        assert ended - started - 0.1 < summary.pop(name) < 1e5
    assert 0 <= summary.pop("seconds_since_begun") < 1e5
    assert summary == {"final_accuracy": 0.75, "seed": 0, "lives": 1}

    shown = capfd.readouterr().out
    for line in (
        "starting engines ...",
        "step 2/2  accuracy 1.500",
        "held-out, before: accuracy 25.0%",
        "before training",
    ):
        assert line in shown
    assert r"3\x1b[2J" in shown
    assert "[bold]Answer: 3" in shown
    assert "\x1b" not in shown


def test_warnings_of_this_package_are_shown_and_others_are_not(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    observer = RunObserver(config, read)
    logging.getLogger("dapo_megatron.data.prompts").warning("3 of 8 prompts are left out")
    logging.getLogger("some_library").warning("chatter")
    observer.close()
    shown = capfd.readouterr()
    assert "3 of 8 prompts are left out" in shown.out
    assert "chatter" not in shown.out + shown.err
    log = (tmp_path / "test/log.txt").read_text()
    assert "3 of 8 prompts are left out" in log
    assert "chatter" in log


def test_output_comes_back_after_a_failure(
    config: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no sinks")

    monkeypatch.setattr("dapo_megatron.obs.observer.open_sinks", fail)
    with pytest.raises(RuntimeError, match="no sinks"):
        RunObserver(config, read)
    print("still here")
    assert "still here" in capfd.readouterr().out


def test_after_the_last_words_nothing_is_seen(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    observer = RunObserver(config, read)
    observer.last_words("error: the engine died")
    logging.getLogger("dapo_megatron").warning("warned later")
    observer.close()
    os.system("echo a child; echo its error >&2")
    seen = capfd.readouterr()
    assert seen.err == "error: the engine died\n"
    assert seen.out.splitlines() == [f"{tmp_path / 'test'}: metrics, responses and log.txt of this run"]
    log = (tmp_path / "test/log.txt").read_text()
    for text in ("error: the engine died", "warned later", "a child", "its error"):
        assert text in log


def test_last_words_of_a_closed_observer_are_seen(config: Config, capfd: pytest.CaptureFixture[str]) -> None:
    observer = RunObserver(config, read)
    observer.close()
    observer.last_words("error: engine 0 did not end")
    assert capfd.readouterr().err == "error: engine 0 did not end\n"


def test_a_full_disk_does_not_end_a_run(config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "test"
    observer = RunObserver(config, read)
    group = replace(GROUP, prompt=replace(GROUP.prompt, text="x" * 30_000))  # the log and the terminal need less
    observer.step(0, {}, [group])
    whole = (folder / "rollouts.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 100, before[1]))
    try:
        for step in (1, 2):
            observer.step(step, {}, [group])
        observer.summary({"seed": 0, "long": "x" * 2 * whole}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    observer.step(3, {}, [group])
    observer.close()
    assert [row["step"] for row in rows(folder / "rollouts.jsonl")] == [1, 2, 3, 4]
    shown = capfd.readouterr().out
    assert shown.count("rollouts.jsonl: could not write the responses of step 2 (OSError") == 1
    assert "rollouts.jsonl: could not write the responses of step 3" not in shown
    assert "summary.json: could not write it (OSError" in shown


def test_other_ranks_show_and_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    observer = NullObserver()
    with observer.phase("rollout"):
        observer.message("hello")
    observer.step(0, {}, [GROUP])
    observer.evaluation("before", HELD, RESULT)
    observer.summary({}, {})
    observer.close()
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_a_log_that_takes_no_more_does_not_end_a_run(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with capfd.disabled():
        saved = os.dup(1), os.dup(2)
        full = os.open("/dev/full", os.O_WRONLY)
        try:
            os.dup2(full, 1)
            os.dup2(full, 2)
            observer = RunObserver(config, read)
            observer.message("going on")
            observer.step(0, {"reward": 1.0}, [GROUP])
            observer.last_words("error: the engine died")
            observer.close()
        finally:
            for number, descriptor in enumerate(saved, 1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.close(full)
    assert "going on" in (tmp_path / "test/log.txt").read_text()
    assert "error: the engine died" in (tmp_path / "test/log.txt").read_text()


@pytest.mark.parametrize("waits", ["engine 0 with 3 prompts\x1b[2J", ""])
def test_a_phase_that_takes_long_says_what_it_waits_for(
    waits: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(observer_module, "_REMIND_SECONDS", 0.02)
    observer = RunObserver(config, read)
    observer.ask_what_is_waited_for(lambda: waits)
    with observer.phase("rollout"):
        time.sleep(0.2)
    with observer.phase("publish"):
        pass
    observer.close()
    shown, log = capfd.readouterr().out, (tmp_path / "test/log.txt").read_text()
    for text in (shown, log):
        assert ("rollout, for 0 s, waits for engine 0 with 3 prompts" in text) == bool(waits)
        assert "\x1b" not in text and "publish, for" not in text


def test_sets_with_names_have_metrics_of_their_own(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    aime = replace(HELD, name="aime")
    with closing(RunObserver(config, read)) as observer:
        observer.evaluation("before", aime, replace(RESULT, samples=4, pass_at_k={1: 0.25, 4: 0.5}, majority_at_k=0.3))
        observer.summary({}, {"aime": {"before": RESULT}})
    (row,) = rows(tmp_path / "test/metrics.jsonl")
    names = ("accuracy", "accuracy_low", "accuracy_high", "pass_at_k", "majority_at_k", "response_length", "truncated")
    assert [row[f"eval/aime/{name}"] for name in names] == [0.25, 0.125, 0.375, 0.5, 0.3, 12.5, 0.0]
    assert {f"eval/{name}" for name in names} < set(METRICS)
    assert not any(name.startswith("eval/") and not name.startswith("eval/aime/") for name in row)
    shown = capfd.readouterr().out
    assert "aime, before: accuracy 25.0%" in shown and "aime, before training\n" in shown
