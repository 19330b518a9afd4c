from __future__ import annotations

import json
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_megatron import config_file
from dapo_megatron.config import HELD_OUT, HeldOut
from dapo_megatron.errors import DapoError, EngineError, RolloutError
from dapo_megatron.eval.evaluate import EvalResult
from dapo_megatron.leader import Evaluations, Leader
from dapo_megatron.obs.observer import RunObserver
from dapo_megatron.state import Kept
from tests.helpers.completions import read
from tests.obs.test_observer import RESULT


def test_an_evaluation_of_an_earlier_life_is_shown_at_the_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    earlier: Kept[Evaluations] = Kept(Evaluations, {HELD_OUT: {"before": RESULT}, "aime": {"before": RESULT}})
    evaluations: Kept[Evaluations] = Kept(Evaluations, {})
    evaluations.load_state_dict(json.loads(json.dumps(earlier.state_dict())))
    run = {"dir": str(tmp_path), "name": "test", "tensorboard": False}
    config = config_file.parse({"model": {"path": "x"}, "data": {"train": "x"}, "run": run, "train": {"steps": 7}})
    with closing(RunObserver(config, read)) as observer:
        leader: Any = SimpleNamespace(config=config, evaluations=evaluations, _obs=observer, prompts=1, carried=2)
        Leader._summarise(leader)
        assert Leader.state.fget(leader)["record"] is observer  # pyright: ignore[reportOptionalCall]
    summary = json.loads((tmp_path / "test/summary.json").read_text())
    assert (summary["base_accuracy"], summary["base_length"], summary["steps"]) == (0.25, 12.5, 7)
    assert (summary["aime/base_accuracy"], "aime/final_accuracy" in summary) == (0.25, False)
    shown = capfd.readouterr().out
    assert "before training\n  1+2=  right, 3 expected" in shown and "held-out, before: accuracy 25.0%" in shown


def test_sets_are_evaluated_when_each_is_due_by_its_own_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {
        "often": {"data": "o", "every": 1, "samples": 2, "rule": "dapo"},
        "seldom": {"data": "s", "every": 2, "rule": "lenient"},
        "ends": {"data": "e"},
    }
    config = config_file.parse({"model": {"path": "x"}, "data": {"train": "x"}, "eval": {"sets": sets}})
    seen: list[tuple[Any, ...]] = []

    def evaluate(engines: Any, prompts: Any, judge: Any, decode: Any, its: HeldOut, **_: Any) -> EvalResult:
        return replace(RESULT, prompts=len(prompts), samples=its.samples, examples=(prompts, judge))

    def take(when: str, its: HeldOut, result: Any) -> None:
        seen.append((when, its.name, result.samples, *result.examples))

    monkeypatch.setattr("dapo_megatron.leader.evaluate", evaluate)
    leader: Any = object.__new__(Leader)
    leader.config, leader.evaluations = config, Kept(Evaluations, {})
    leader.engines, leader.sampling = (
        SimpleNamespace(sample=lambda result: result),
        SimpleNamespace(max_tokens=1, stop_token_ids=()),
    )
    leader._obs = SimpleNamespace(phase=lambda name: nullcontext(), evaluation=take)
    leader._held_out = {name: f"prompts of {name}" for name in sets}
    leader._judges, leader._decode = {"dapo": "judge dapo", "lenient": "judge lenient"}, read
    stop: Any = SimpleNamespace(interruptible=nullcontext)
    for step in (0, 0, 1, 2):
        leader.evaluate_due(step, stop)
    often, seldom, ends = (
        ("often", 2, "prompts of often", "judge dapo"),
        ("seldom", 1, "prompts of seldom", "judge lenient"),
        ("ends", 1, "prompts of ends", "judge dapo"),
    )
    first = [("before", *its) for its in (often, seldom, ends)]
    assert seen == [*first, ("step 1", *often), ("step 2", *often), ("step 2", *seldom)]


def test_the_best_step_is_the_first_of_the_highest_accuracy_among_those_that_are_there() -> None:
    config = SimpleNamespace(checkpoint=SimpleNamespace(keep_best="aime"), train=SimpleNamespace(steps=40))
    accuracies = {"before": 0.9, "step 10": 0.5, "step 20": 0.5, "step 30": 0.7, "after": 0.6}
    results = {when: replace(RESULT, accuracy=accuracy) for when, accuracy in accuracies.items()}
    other = {"step 20": replace(RESULT, accuracy=1.0)}
    leader: Any = SimpleNamespace(config=config, evaluations=Kept(Evaluations, {"aime": results, "math": other}))
    bests = [Leader.best(leader, steps) for steps in ([10, 20, 30, 40], [10, 20, 25], [40, 10], [25], [])]
    assert bests == [30, 10, 40, None, None]


@pytest.mark.parametrize("error", [EngineError("gone for good"), RolloutError("gone for good")])
def test_an_evaluation_that_fails_has_the_run_save(monkeypatch: pytest.MonkeyPatch, error: DapoError) -> None:
    def sample(work: Any) -> Any:
        raise error

    asked: list[tuple[str, int]] = []
    stop: Any = SimpleNamespace(interruptible=nullcontext, ask=lambda *reason: asked.append(reason))
    leader: Any = object.__new__(Leader)
    leader.config = config_file.parse({"model": {"path": "x"}, "data": {"train": "x"}, "eval": {"data": "x"}})
    leader.evaluations, leader.engines = Kept(Evaluations, {}), SimpleNamespace(sample=sample)
    leader.sampling = SimpleNamespace(max_tokens=4, stop_token_ids=())
    leader._held_out, leader._judges, leader._decode = {HELD_OUT: []}, {"dapo": None}, None
    leader._obs = SimpleNamespace(phase=lambda name: nullcontext())
    monkeypatch.setattr("dapo_megatron.leader.evaluate", lambda *_, **__: None)
    leader.evaluate_due(0, stop)
    assert asked == [("error: gone for good", 1)]
    assert not leader.evaluations.value
