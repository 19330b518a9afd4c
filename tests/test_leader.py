from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_megatron import config_file
from dapo_megatron.eval.evaluate import EvalResult
from dapo_megatron.leader import Leader
from dapo_megatron.obs.observer import RunObserver
from dapo_megatron.state import Kept
from tests.helpers.completions import read
from tests.obs.test_observer import RESULT


def test_an_evaluation_of_an_earlier_life_is_shown_at_the_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    earlier: Kept[dict[str, EvalResult]] = Kept(dict[str, EvalResult], {"before": RESULT})
    evaluations: Kept[dict[str, EvalResult]] = Kept(dict[str, EvalResult], {})
    evaluations.load_state_dict(json.loads(json.dumps(earlier.state_dict())))
    run = {"dir": str(tmp_path), "name": "test", "tensorboard": False}
    config = config_file.parse({"model": {"path": "x"}, "data": {"train": "x"}, "run": run, "train": {"steps": 7}})
    with closing(RunObserver(config, read)) as observer:
        leader: Any = SimpleNamespace(config=config, evaluations=evaluations, _obs=observer, prompts=1, carried=2)
        Leader.summarise(leader)
        assert Leader.state.fget(leader)["record"] is observer  # pyright: ignore[reportOptionalCall]
    summary = json.loads((tmp_path / "test/summary.json").read_text())
    assert (summary["base_accuracy"], summary["base_length"], summary["steps"]) == (0.25, 12.5, 7)
    shown = capfd.readouterr().out
    assert "before training\n  1+2=  right, 3 expected" in shown and "held-out, before: accuracy 25.0%" in shown
